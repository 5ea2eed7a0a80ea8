"""A loop in a file draws what `Sampler.run` draws, for every batch, and checks what it is given."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import amed_engine
from amed_engine import (
    AmedError,
    AMEDPredictor,
    CoefficientPredictor,
    ConfigError,
    Midpoint,
    Sampler,
    load_package,
    make_plan,
    make_solver,
)
from amed_engine.engine.export.write import Job, trace
from amed_engine.engine.runner import BoundLoop
from amed_engine.sampling.denoiser import Denoised
from amed_engine.solvers.program import Program

SHAPE = (2, 6, 6)
BATCHES = (1, 2, 5, 17)
FORMATS = {"pt2": "loop.pt2", "exported": "loop.pt2", "onnx": "loop.onnx"}


class TinyConv(nn.Module):
    """A denoiser of a few convolutions with a bottleneck of 3 x 3; its answer depends on noise level and class."""

    img_channels, img_resolution, sigma_min, sigma_max = 2, 6, 0.002, 80.0

    def __init__(self, label_dim: int):
        super().__init__()
        self.label_dim = label_dim
        self.encode, self.decode = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 2, 3, 1, 1)
        self.embed = nn.Linear(label_dim, 4) if label_dim else None

    def forward(self, x, sigma, labels=None):
        sigma = sigma.view(-1, 1, 1, 1)
        bottleneck = self.encode(x / (1 + sigma**2).sqrt())
        if labels is not None:
            bottleneck = bottleneck + self.embed(labels)[:, :, None, None]
        detail = self.decode(nn.functional.interpolate(bottleneck, scale_factor=2.0))
        return Denoised(x / (1 + sigma**2) + sigma / (1 + sigma**2).sqrt() * detail.tanh(), bottleneck)


class Halves(nn.Module):
    """Under a name that wrappers have, but it computes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return Denoised(0.5 * self.module(*inputs).x0)


def test_a_wrapper_that_computes_is_part_of_the_file(tmp_path):
    sampler = Sampler(Halves(TinyConv(3)), solver="euler", nfe=2)
    sampler.export(tmp_path / "loop.pt2", "exported", verify=False)
    x, labels = torch.randn(2, *SHAPE), torch.eye(3)[:2]
    expected = sampler.run(x, labels).images
    torch.testing.assert_close(
        load_package(tmp_path / "loop.pt2").run(x, labels).images, expected, rtol=1e-4, atol=1e-4
    )


def make_sampler(label_dim: int = 3, solver: str = "amed", nfe: int = 3, **options) -> Sampler:
    """With random weights, and a predictor that matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, predictor = TinyConv(label_dim), AMEDPredictor(0.1, 0.1, bottleneck=(3, 3), hidden_dim=8)
        for parameter in predictor.parameters():
            nn.init.normal_(parameter, std=0.5)
    predictor.plan = make_plan(nfe, solver=solver, midpoint=True, **options)
    return Sampler(model, predictor)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return make_sampler()


@pytest.fixture(scope="module")
def files(sampler, tmp_path_factory):
    """The loop of a conditional model in every format, written once."""
    folder = tmp_path_factory.mktemp("packages")
    written = {}
    for format, name in FORMATS.items():
        done = sampler.export(folder / format / name, format, max_batch=8)
        assert done.path == folder / format / name
        assert sorted(done.differences) == [1, 2, 5]
        assert max(done.differences.values()) < 1e-5 * float(sampler.run(range(5)).images.abs().max())
        assert os.listdir(done.path.parent) == [name], "nothing but the file is left"
        written[format] = done.path
    return written


@pytest.fixture(scope="module")
def packages(files):
    """Read back, once."""
    return {format: load_package(file) for format, file in files.items()}


def latents(batch: int) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))


def close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("format", FORMATS)
def test_a_package_draws_what_the_sampler_draws_in_every_batch(sampler, packages, format):
    package = packages[format]
    for batch in BATCHES:
        labels = [row % 3 for row in range(batch)]
        expected = sampler.run(latents(batch), labels)
        result = package.run(latents(batch), labels)
        close(result.images, expected.images)
        assert (result.nfe, result.plan.sigmas, result.backend) == (3, sampler.plan.sigmas, format)
        assert result.chunks == -(-batch // 8)
    vectors = torch.tensor([[0.2, 0.5, 0.3]])
    close(package.run(latents(1), vectors).images, sampler.run(latents(1), vectors).images)


@pytest.mark.parametrize("format", FORMATS)
def test_seeds_stand_for_the_same_images_in_a_package(sampler, packages, format):
    expected, result = sampler.run([4, 0, 9]), packages[format].run([4, 0, 9])
    close(result.images, expected.images)
    assert result.seeds == [4, 0, 9]
    assert torch.equal(result.labels, expected.labels)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("batch", "labels", "message"),
    [
        (torch.zeros(2, 1, 6, 6), None, r"latents must have shape \(B, 2, 6, 6\) for this model, got \(2, 1, 6, 6\)"),
        (torch.zeros(2, 2, 6), None, "latents must have shape"),
        (torch.zeros(0, *SHAPE), None, "the batch is empty"),
        (
            torch.zeros(2, *SHAPE).double(),
            None,
            "latents must be torch.float32, the sampler's dtype, got torch.float64",
        ),
        (torch.zeros(2, *SHAPE, device="meta"), None, "latents are on meta"),
        (torch.full((2, *SHAPE), float("nan")), None, "NaN"),
        (latents(2), [1, 3], "class_labels must be in 0 .. 2, got 3"),
        (latents(2), [1, 2, 1], "class_labels must be one integer, 2 integers or vectors"),
        (latents(2), torch.zeros(2, 4), r"vectors must have shape \(2, 3\)"),
        (latents(2), torch.full((2, 3), float("nan")), "class_labels hold NaN"),
        ("two", None, "batch must be a number of samples"),
    ],
)
def test_a_package_refuses_what_its_graph_would_not(packages, format, batch, labels, message):
    with pytest.raises(ConfigError, match=message):
        packages[format].run(batch, labels)


@pytest.mark.parametrize("format", FORMATS)
def test_strided_and_unaligned_latents_are_latents(sampler, packages, format):
    package, expected = packages[format], sampler.run(latents(3), 1).images
    strided = latents(3).permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert not strided.is_contiguous()
    close(package.run(strided, 1).images, expected)
    unaligned = torch.cat([torch.zeros(1), latents(3).flatten()])[1:].view(3, *SHAPE)
    close(package.run(unaligned, 1).images, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_says_what_it_holds(sampler, packages, format):
    facts = packages[format].facts.to_json()
    assert facts["inputs"] == [
        {"name": "latents", "dtype": "float32", "shape": ["batch", *SHAPE]},
        {"name": "labels", "dtype": "float32", "shape": ["batch", 3]},
    ]
    assert (facts["nfe"], facts["max_batch"]) == (3, 8)
    assert (facts["sigma_max"], facts["sigma_min"]) == pytest.approx((80.0, 0.002))
    assert facts["versions"] == {"amed_engine": amed_engine.__version__, "torch": torch.__version__}
    assert facts["plan"]["sigmas"] == list(sampler.plan.sigmas)


def test_a_package_may_be_renamed(files, tmp_path):
    for format in ("pt2", "exported"):
        moved = tmp_path / f"{format} of mine.pt2"
        moved.write_bytes(files[format].read_bytes())
        assert load_package(moved).run(2).images.shape == (2, *SHAPE)


def test_the_onnx_graph_needs_nothing_but_onnxruntime(sampler, files):
    """No custom operator, names as documented, a free batch: checked without this package in between."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    onnx.checker.check_model(onnx.load(files["onnx"]), full_check=True)
    session = runtime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    for batch in BATCHES:
        labels = np.eye(3, dtype=np.float32)[np.arange(batch) % 3]
        (images,) = session.run(["images"], {"latents": latents(batch).numpy(), "labels": labels})
        close(torch.from_numpy(images), sampler.run(latents(batch), torch.from_numpy(labels)).images)


def test_onnx_has_the_quantile_of_thresholding(tmp_path):
    """On latents whose estimates leave [-1, 1]."""
    pytest.importorskip("onnxscript")
    sampler = Sampler(TinyConv(0), solver="dpmpp", nfe=3, solver_options={"thresholding": True})
    sampler.export(tmp_path / "loop.onnx", "onnx", verify=False)
    package, wide = load_package(tmp_path / "loop.onnx"), 3 * latents(7)
    off = Sampler(sampler.model.network, solver="dpmpp", nfe=3)
    assert not torch.allclose(sampler.run(wide).images, off.run(wide).images)
    close(package.run(wide).images, sampler.run(wide).images)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    pytest.importorskip("onnxscript")

    def denoise(x, sigma):
        return x * x.flatten(1).kthvalue(3, dim=1).values.view(-1, 1, 1, 1)

    with pytest.raises(ConfigError, match=r"cannot be written as ONNX: .*kthvalue.*'exported' and 'pt2'"):
        Sampler(denoise, solver="euler", nfe=2, shape=SHAPE).export(tmp_path / "a.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def exports(sampler: Sampler, tmp_path) -> None:
    sampler.export(tmp_path / "loop.pt2", "exported", verify=False)
    package = load_package(tmp_path / "loop.pt2")
    for batch in (1, 5):
        close(package.run(latents(batch)).images, sampler.run(latents(batch)).images)


@pytest.mark.slow
def test_a_program_without_python_draws_the_samples_of_the_seeds(sampler, files, tmp_path):
    """csrc/examples/run_package, built as its CMakeLists.txt says; more seeds than one call of the loop takes."""
    cmake = shutil.which("cmake")
    if not cmake or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("needs cmake and a C++ compiler")
    source = Path(__file__).resolve().parents[3] / "csrc/examples/run_package"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for step in ([cmake, "-S", source, "-B", tmp_path / "build", prefix], [cmake, "--build", tmp_path / "build"]):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if torch.version.cuda and "cannot find the CUDA" in done.stderr:
            pytest.skip("a torch built for CUDA wants the CUDA toolkit beside it, which CMake does not find here")
        assert done.returncode == 0, done.stdout + done.stderr
    program, seeds = tmp_path / "build/run_package", [7, 0, 2**32 - 1, 5, 1, 2, 3, 4, 9]
    command = [program, files["pt2"], tmp_path / "samples.npy", *map(str, seeds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    close(torch.from_numpy(np.load(tmp_path / "samples.npy")), sampler.run(seeds).images)
    command = [program, files["pt2"], tmp_path / "ones.npy", "--class", "1", "3", "4"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0
    close(torch.from_numpy(np.load(tmp_path / "ones.npy")), sampler.run([3, 4], class_labels=1).images)
    for code, message, arguments in (
        (1, "run_package: ", [__file__, "a.npy", "1"]),
        (1, "a seed must be a whole number below 4294967296, got '-1'", [files["pt2"], "a.npy", "-1"]),
        (1, "got '4294967296'", [files["pt2"], "a.npy", "4294967296"]),
        (1, "no seeds", [files["pt2"], "a.npy", "--class", "1"]),
        (1, "--class must be below 3", [files["pt2"], "a.npy", "--class", "3", "1"]),
        (1, "cannot write", [files["pt2"], tmp_path / "no" / "a.npy", "1"]),
        (2, "usage:", [files["pt2"]]),
    ):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1)
        assert message in done.stderr


def test_a_solver_exports(tmp_path):
    exports(Sampler(TinyConv(0), solver="heun", nfe=2), tmp_path)


def test_a_solver_with_memory_and_a_corrector_exports_under_a_predictor(tmp_path):
    exports(make_sampler(0, "unipc"), tmp_path)


def test_coefficients_of_each_sample_export(tmp_path):
    """Non-stationary ones, with offsets that are read from the bottleneck at every evaluation."""
    predictor = CoefficientPredictor(3, 80.0, codes=2, inputs=13)
    predictor.plan = make_plan(3, solver="nonstationary", midpoint=True, afs=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i in range(3):
            predictor.coefficients[i, : i + 2] = 1 / (i + 2)
        for values in (predictor.heads, predictor.basis):
            values.copy_(0.1 * torch.randn(values.shape, generator=generator))
    sampler = Sampler(TinyConv(0), predictor)
    exports(sampler, tmp_path)
    predictor.heads.data.zero_()
    assert not torch.allclose(Sampler(sampler.model.network, predictor).run([0, 1]).images, sampler.run([0, 1]).images)


def test_wide_scales_export(tmp_path):
    sampler = make_sampler(0)
    predictor = AMEDPredictor(0.5, 0.5, scales="wide", bottleneck=(3, 3), hidden_dim=8)
    predictor.load_state_dict(sampler.program.predictor.state_dict())
    predictor.plan = sampler.plan
    exports(Sampler(sampler.model.network, predictor), tmp_path)


def test_a_loop_without_labels_takes_none(tmp_path):
    Sampler(TinyConv(0), solver="euler", nfe=2).export(tmp_path / "loop.pt2", "exported", verify=False)
    package = load_package(tmp_path / "loop.pt2")
    assert (package.facts.label_dim, len(package.facts.to_json()["inputs"])) == (0, 1)
    with pytest.raises(ConfigError, match="unconditional"):
        package.run(latents(5), 1)


def test_parallel_points_export(tmp_path):
    """K points of one interval are one batched call, K times the batch, labels included."""
    sampler, middle = make_sampler(), Midpoint(torch.tensor([0.3, 0.7]), torch.ones(2), torch.ones(2))
    program = Program.build(make_solver("amed", points=2), sampler.plan.levels, [middle] * sampler.plan.intervals)
    loop = BoundLoop(sampler.model, program.on(sampler.device, sampler.dtype), None)
    graph = trace(Job(loop, sampler.plan, sampler.device, sampler.dtype)).module()
    for batch in (1, 5):
        labels = torch.eye(3)[torch.arange(batch) % 3]
        close(graph(latents(batch), labels), loop(latents(batch), labels).detach())


def test_guidance_is_fixed_in_the_file(tmp_path):
    sampler = Sampler(TinyConv(3), solver="ipndm", nfe=3)
    sampler.export(tmp_path / "guided.pt2", "exported", guidance_scale=2.5, verify=False)
    package = load_package(tmp_path / "guided.pt2")
    assert package.facts.plan.guidance_scale == 2.5
    guided = sampler.run(latents(4), [0, 1, 2, 0], guidance_scale=2.5).images
    close(package.run(latents(4), [0, 1, 2, 0]).images, guided)
    assert not torch.allclose(guided, sampler.run(latents(4), [0, 1, 2, 0]).images)


def test_a_double_sampler_exports_in_double(tmp_path):
    sampler = Sampler(TinyConv(0).double(), solver="dpmpp", nfe=3, dtype=torch.float64)
    differences = sampler.export(tmp_path / "double.pt2", "exported").differences
    assert max(differences.values()) < 1e-12
    assert load_package(tmp_path / "double.pt2").run(latents(2).double()).images.dtype == torch.float64


def test_other_forms_of_a_model_export_too(tmp_path):
    """A callable round a module, a compiled module and an exported one."""
    model = TinyConv(0).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (latents(3), torch.ones(3)), dynamic_shapes=({0: batch}, {0: batch}))
    forms = {
        "callable": lambda x, sigma: tuple(model(x, sigma)),
        "compiled": torch.compile(model, backend="eager"),
        "exported": program,
    }
    expected = Sampler(model, solver="euler", nfe=2).run(latents(3)).images
    for name, form in forms.items():
        file = tmp_path / f"{name}.pt2"
        Sampler(form, solver="euler", nfe=2, shape=SHAPE, sigma_max=80).export(
            file, "exported", max_batch=32, verify=False
        )
        close(load_package(file).run(latents(3)).images, expected)


# ---- what cannot be written


def test_a_model_that_branches_on_values_is_refused(tmp_path):
    def denoise(x, sigma):
        return x * 0.5 if sigma[0] > 1 else x * 0.1

    with pytest.raises(ConfigError, match=r"the model cannot be exported.*without branches on values"):
        Sampler(denoise, solver="euler", nfe=2, shape=SHAPE).export(tmp_path / "no.pt2", "exported")
    assert list(tmp_path.iterdir()) == []


def test_a_loop_that_differs_is_not_written(tmp_path):
    """A model with memory: traced, its count is a constant."""
    calls = []

    def denoise(x, sigma):
        calls.append(1)
        return x * (0.5 + len(calls))

    sampler = Sampler(denoise, solver="euler", nfe=2, shape=SHAPE)
    with pytest.raises(AmedError, match=r"differs from the sampler by .* nothing was written"):
        sampler.export(tmp_path / "no.pt2", "exported")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("a.pt2", {"format": "torchscript"}, "format must be one of pt2, exported, onnx"),
        ("a.onnx", {"format": "pt2"}, r"format 'pt2' is written to a \.pt2 file, got '.*a\.onnx'"),
        ("a.pt2", {"format": "onnx"}, r"written to a \.onnx file"),
        ("a.pt2", {"max_batch": 0}, "max_batch must be an integer of at least 3, got 0"),
        ("a.pt2", {"format": "exported", "options": {"a": 1}}, "format 'exported' takes no options"),
        ("a.pt2", {"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(sampler, tmp_path, path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        sampler.export(tmp_path / path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_unknown_shape_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="pass shape="):
        Sampler(lambda x, sigma: x, solver="euler", nfe=2).export(tmp_path / "a.pt2")


def test_without_the_onnx_libraries_the_extra_is_named(sampler, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"ONNX needs onnxscript; pip install 'amed-engine\[onnx\]'"):
        sampler.export(tmp_path / "a.onnx", "onnx")


@pytest.mark.parametrize("guidance_scale", [None, 2.5])
@pytest.mark.parametrize("format", [pytest.param("pt2", marks=pytest.mark.slow), "exported", "onnx"])
def test_a_file_starts_about_the_mean_of_each_class(tmp_path, format, guidance_scale):
    for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
        pytest.importorskip(name)
    if format == "pt2" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = TinyConv(3)
    nn.init.constant_(model.decode.bias, 2.0)  # data about 1
    levels = torch.tensor([80.0, 40.0, 20.0, 10.0])  # on which the start is not forgotten
    sampler, zero = (Sampler(model, solver="unipc", schedule=levels, afs=afs) for afs in ("mean", True))
    sampler.export(tmp_path / FORMATS[format], format, guidance_scale=guidance_scale)
    package, labels = load_package(tmp_path / FORMATS[format]), torch.eye(3)[[2, 0, 1, 1, 2]]
    expected = sampler.run(latents(5), labels, guidance_scale=guidance_scale).images
    close(package.run(latents(5), labels).images, expected)
    assert not torch.allclose(zero.run(latents(5), labels, guidance_scale=guidance_scale).images, expected, atol=1e-2)
    # The numbers of the mean are in the graph, once.
    assert (package.facts.plan.afs, package.facts.plan.mean) == ("mean", None)
