"""Models opened from a path: each gives what the eager model gives, and refuses inputs it was not made for."""

import json
import shutil
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import amed_engine
from amed_engine.adapters import Signature, load_onnx, load_package, save_package, wrap
from amed_engine.adapters.compiled import KEY, is_package
from amed_engine.engine.graphs import GraphCache
from amed_engine.engine.resolve import resolve
from amed_engine.errors import ConfigError, FileFormatError

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.3, 5.0, 20.0])


def batch_of(high=16):
    return {0: torch.export.Dim("batch", min=1, max=high)}


@torch.no_grad()
def assert_same(opened, eager, *inputs):
    for got, expected in zip(opened(*inputs), eager(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---- AOTInductor


@pytest.fixture(scope="module")
def eager(make_unet):
    """Classes, a bottleneck, and steps found by interpolation."""
    return wrap(make_unet(num_classes=4), "epsilon", null_class=3)


def compiled(denoiser, folder):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler")
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        return save_package(denoiser, folder / "unet.pt2", max_batch=4)


@pytest.fixture(scope="module")
def package(eager, tmp_path_factory):
    """Compiled once: that takes a C++ compiler and some seconds."""
    return compiled(eager, tmp_path_factory.mktemp("package"))


@pytest.mark.slow
def test_a_package_gives_what_the_eager_model_gives(eager, package):
    labels = torch.eye(4)[[0, 3, 2]]
    opened = load_package(package)
    assert is_package(package)
    for batch in (1, 2, 3):
        assert_same(opened, eager, X[:batch], SIGMA[:batch], labels[:batch])
    assert (opened.sample_shape, opened.label_dim) == ((1, 8, 8), 4)
    assert opened.sigma_max == pytest.approx(eager.sigma_max)


@pytest.mark.slow
def test_a_package_without_classes_takes_x_and_sigma_alone(make_unet, tmp_path):
    plain = wrap(make_unet(), "epsilon")
    opened = load_package(compiled(plain, tmp_path))
    for batch in (1, 3):
        assert_same(opened, plain, X[:batch], SIGMA[:batch])
    assert (opened.sample_shape, opened.label_dim) == ((1, 8, 8), 0)
    with pytest.raises(ConfigError, match=r"takes 2 inputs \(x, sigma\), got 3"):
        opened(X, SIGMA, torch.eye(4)[:3])


@pytest.mark.slow
def test_a_package_samples_from_its_path(eager, package):
    request = {"class_labels": [0, 2], "guidance_scale": 2.0}
    expected = amed_engine.Sampler(eager).run([1, 2], **request).images
    torch.testing.assert_close(
        amed_engine.Sampler(package).run([1, 2], **request).images, expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_a_package_is_captured_like_any_network(eager, package, double):
    opened = load_package(package)
    sampler, plain = (amed_engine.Sampler(model, solver="ipndm", nfe=4) for model in (opened, eager))
    sampler._runner.cache = GraphCache(double, (1, 4), opened, warmups=1)
    result = sampler.run(range(6))  # 4, and 2 padded to 4
    assert result.backend == "graph"
    torch.testing.assert_close(result.images, plain.run(range(6)).images, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_package_refuses_what_it_would_misread(package):
    opened, labels = load_package(package), torch.eye(4)[:3]
    for inputs, message in [
        ((X[:, :, :4], SIGMA, labels), r"x must be float32 \(B, 1, 8, 8\) for this model, got float32 \(3, 1, 4, 8\)"),
        ((X.double(), SIGMA, labels), "got float64"),
        ((X.transpose(2, 3), SIGMA, labels), "x must be contiguous"),
        ((X, SIGMA[:2], labels), "sigma has 2 rows for a batch of 3"),
        ((X.repeat(2, 1, 1, 1), SIGMA.repeat(2), labels.repeat(2, 1)), "batch of 1 to 4, got 6"),
        ((X, SIGMA), "takes 3 inputs"),
        ((X, SIGMA, [0, 1, 2]), "class_labels must be a tensor"),
    ]:
        with pytest.raises(ConfigError, match=message):
            opened(*inputs)
    with pytest.raises(ConfigError, match="no gradients"):
        opened(X.clone().requires_grad_(), SIGMA, labels)
    with pytest.raises(ConfigError, match="ask for that many samples"):
        amed_engine.Sampler(package).run(5)


def fake_package(path, metadata):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data/aotinductor/model/x.wrapper.so", b"not a library")
        if metadata is not None:
            archive.writestr("m/data/aotinductor/model/x.wrapper_metadata.json", metadata)
    return path


SIGNED = {"inputs": [{"dtype": "float32", "shape": [1, 8, 8]}, {"dtype": "float32", "shape": []}], "batch": [1, 4]}
SIGNED |= {"device": "cpu", "sigma_min": 0.1, "sigma_max": None}


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        (None, ConfigError, "without a signature"),
        ("{}", ConfigError, "without a signature"),
        ("[1", FileFormatError, "no JSON"),
        (json.dumps({KEY: "[]"}), FileFormatError, "must be an object"),
        (json.dumps({KEY: "{}"}), FileFormatError, "damaged: KeyError"),
        (json.dumps({KEY: json.dumps(SIGNED | {"inputs": SIGNED["inputs"][:1]})}), FileFormatError, "1 inputs"),
        (json.dumps({KEY: json.dumps(SIGNED | {"sigma_min": -1})}), FileFormatError, "noise level -1"),
        (json.dumps({KEY: json.dumps(SIGNED)}), FileFormatError, "cannot be loaded here"),
    ],
)
def test_a_package_that_is_none_is_refused_before_its_code_is_loaded(tmp_path, metadata, error, message):
    with pytest.raises(error, match=message):
        amed_engine.Sampler(fake_package(tmp_path / "bad.pt2", metadata))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda s: (
        st.lists(s)
        | st.dictionaries(st.sampled_from(["inputs", "batch", "device", "sigma_min", "sigma_max", "dtype", "shape"]), s)
    ),
    max_leaves=12,
)


@settings(max_examples=100)
@given(anything | st.tuples(st.sampled_from(sorted(SIGNED)), anything).map(lambda entry: SIGNED | dict([entry])))
def test_any_json_is_a_signature_or_our_error(data):
    """Also a sound one with one entry changed: most of what is read stands behind the first entry that is wrong."""
    try:
        signature = Signature.from_json(data, "file")
    except FileFormatError:
        return
    assert Signature.from_json(json.loads(json.dumps(signature.to_json())), "file") == signature


def test_a_signature_survives_json():
    signature = Signature.from_json(SIGNED, "file")
    assert Signature.from_json(json.loads(json.dumps(signature.to_json())), "file") == signature
    assert (signature.sample_shape, signature.label_dim, signature.batch) == ((1, 8, 8), 0, (1, 4))


def test_packages_need_a_shape_and_a_name(tmp_path, make_unet):
    with pytest.raises(ConfigError, match="tells its sample shape"):
        save_package(torch.nn.Identity(), tmp_path / "a.pt2")
    with pytest.raises(ConfigError, match=r"saved as \.pt2"):
        save_package(wrap(make_unet(), "epsilon"), tmp_path / "a.so")


# ---- ExportedProgram and TorchScript


@pytest.fixture
def plain(make_unet):
    return wrap(make_unet(), "epsilon")


def test_an_exported_program_knows_its_shape_and_checks_its_inputs(plain, tmp_path):
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(plain, (X, SIGMA), dynamic_shapes=(batch_of(), batch_of())), path)
    opened = resolve(path)
    assert opened.shape == (1, 8, 8)
    assert_same(opened.network, plain, X[:2], SIGMA[:2])
    assert_same(opened.network, plain, X.transpose(2, 3), SIGMA)
    for inputs, message in [
        ((X[..., :4], SIGMA), r"got float32 \(3, 1, 8, 4\)"),
        ((X.double(), SIGMA), "got float64"),
        ((X.repeat(6, 1, 1, 1), SIGMA.repeat(6)), "batch of 1 to 16, got 18"),
    ]:
        with pytest.raises(ConfigError, match=message):
            opened.network(*inputs)


def test_an_exported_program_of_one_batch_says_which(plain):
    program = torch.export.export(plain, (X, SIGMA))
    assert amed_engine.Sampler(program).run(3).images.shape == (3, 1, 8, 8)
    with pytest.raises(ConfigError, match="batch of 3, got 2"):
        amed_engine.Sampler(program).run(2)


def test_an_exported_program_may_have_no_largest_batch():
    class Shrink(torch.nn.Module):
        def forward(self, x, sigma):
            return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Shrink(), (X, SIGMA), dynamic_shapes=(batch, batch))
    assert Signature.of_program(program).batch == (1, 2**31 - 1)
    assert amed_engine.Sampler(program, solver="euler").run(20).images.shape == (20, 1, 8, 8)


def test_a_program_that_is_no_denoiser_is_refused():
    program = torch.export.export(torch.nn.Identity(), (X,))
    with pytest.raises(ConfigError, match=r"takes x, sigma \(B,\)"):
        amed_engine.Sampler(program)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_file_gives_what_the_eager_model_gives(plain, tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.trace(plain, (X, SIGMA)).save(str(path))
    assert_same(resolve(path).network, plain, X[:2], SIGMA[:2])
    got = amed_engine.Sampler(path, shape=(1, 8, 8), sigma_max=20.0).run([1, 2]).images
    torch.testing.assert_close(got, amed_engine.Sampler(plain, sigma_max=20.0).run([1, 2]).images)


# ---- ONNX


@pytest.fixture(scope="module")
def flow(make_unet):
    return wrap(make_unet(), "flow")


@pytest.fixture(scope="module")
def onnx_file(flow, tmp_path_factory):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(
            flow,
            (X, SIGMA),
            path,
            dynamo=True,
            dynamic_shapes=(batch_of(), batch_of()),
            external_data=False,
            verbose=False,
        )
    model = onnx.load(path)
    model.metadata_props.add(key="sigma_max", value="50.0")
    onnx.save(model, path)
    return path


@pytest.fixture
def runtime():
    return pytest.importorskip("onnxruntime", reason="needs pip install 'amed-engine[onnx]'")


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_model_gives_what_the_eager_model_gives(runtime, onnx_file, flow):
    opened = load_onnx(onnx_file, threads=1)
    assert_same(opened, flow, X, SIGMA)
    assert_same(opened, flow, X[:1], SIGMA[:1])
    assert opened.sigma_max == 50.0
    expected = amed_engine.Sampler(flow, sigma_min=0.01, sigma_max=50.0).run([1, 2, 3]).images
    got = amed_engine.Sampler(str(onnx_file), sigma_min=0.01).run([1, 2, 3]).images
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_model_refuses_what_it_was_not_made_for(runtime, onnx_file):
    opened = load_onnx(onnx_file)
    for inputs, message in [
        ((X[..., :4], SIGMA), r"got float32 \(3, 1, 8, 4\)"),
        ((X, SIGMA.double()), "sigma must be float32"),
        ((X.transpose(2, 3), SIGMA), "contiguous"),
        ((X.to("meta"), SIGMA), "the model runs on cpu"),
        ((X, SIGMA[:2]), "2 rows"),
        ((X.clone().requires_grad_(), SIGMA), "no gradients"),
    ]:
        with pytest.raises(ConfigError, match=message):
            opened(*inputs)


def onnx_graph(path, shape=("B", 1, 8, 8), extra=0, kind=1, metadata=None):
    """x -> 0.1·x, with a time that is read, and as many more inputs as asked for."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    x, t = (helper.make_tensor_value_info(name, kind, s) for name, s in (("x", shape), ("t", shape[:1])))
    more = [helper.make_tensor_value_info(f"more{i}", kind, shape[:1]) for i in range(extra)]
    y = helper.make_tensor_value_info("y", kind, shape)
    constant = helper.make_tensor("k", kind, [], [0.1])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "k"], ["y"])], "g", [x, t, *more], [y], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def test_a_raw_onnx_network_is_wrapped_like_any_other(runtime, tmp_path):
    network = load_onnx(onnx_graph(tmp_path / "raw.onnx"))
    expected = wrap(lambda x, t: 0.1 * x, "epsilon", shape=(1, 8, 8))(X, SIGMA).x0
    torch.testing.assert_close(wrap(network, "epsilon")(X, SIGMA).x0, expected)


def test_an_onnx_model_of_one_batch_says_which(runtime, tmp_path):
    sampler = amed_engine.Sampler(onnx_graph(tmp_path / "two.onnx", shape=(2, 1, 8, 8)))
    assert sampler.run(2).images.shape == (2, 1, 8, 8)
    with pytest.raises(ConfigError, match="batch of 2, got 3"):
        sampler.run(3)


def test_onnx_files_that_cannot_work_are_refused(runtime, tmp_path, monkeypatch):
    (tmp_path / "no.onnx").write_bytes(b"nonsense")
    with pytest.raises(FileFormatError, match="no ONNX model"):
        amed_engine.Sampler(tmp_path / "no.onnx")
    with pytest.raises(ConfigError, match="expected x"):
        amed_engine.Sampler(onnx_graph(tmp_path / "many.onnx", extra=2))
    with pytest.raises(FileFormatError, match="sigma_min='zero'"):
        amed_engine.Sampler(onnx_graph(tmp_path / "level.onnx", metadata={"sigma_min": "zero"}))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'amed-engine\[onnx\]'"):
        load_onnx(tmp_path / "no.onnx")
