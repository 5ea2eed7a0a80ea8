"""Bad input: each case is refused before sampling, by an error that says what was got and what would have been right."""

import math
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from amed_engine import (
    AMEDPredictor,
    Midpoint,
    Sampler,
    load,
    load_package,
    make_plan,
    make_schedule,
    make_solver,
    sample,
    save_predictor,
)
from amed_engine.adapters import load_compiled, load_onnx
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import load_program, save_model
from amed_engine.engine.seeds import parse_seeds
from amed_engine.errors import AmedError, ConfigError, FileFormatError

SHAPE = (1, 8, 8)
NAN = float("nan")


@pytest.fixture
def unconditional(tiny_model) -> Sampler:
    return Sampler(tiny_model, solver="euler", nfe=2)


@pytest.fixture
def conditional(tiny_conditional) -> Sampler:
    return Sampler(tiny_conditional, solver="euler", nfe=2)


def trained_for(model, **changes) -> AMEDPredictor:
    predictor = AMEDPredictor(bottleneck=(4, 4))
    predictor.plan = replace(make_plan(5, solver="amed"), model=fingerprint(model), **changes)
    return predictor


# ---- Sampler.run: batch, latents, labels, guidance, out


def latents(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*shape, **options)


def spoiled(value: float) -> torch.Tensor:
    z = torch.zeros(3, *SHAPE)
    z[1, 0, 2, 2] = value
    return z


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (latents(1, 8, 8), r"latents must have shape \(B, 1, 8, 8\), got \(1, 8, 8\)"),
        (latents(2, 1, 1, 8, 8), r"latents must have shape \(B, 1, 8, 8\), got \(2, 1, 1, 8, 8\)"),
        (latents(2, 64), r"latents must have shape \(B, 1, 8, 8\), got \(2, 64\)"),
        (torch.tensor(1.0), r"latents must have shape \(B, 1, 8, 8\), got \(\)"),
        (latents(2, 3, 8, 8), r"latents must have shape \(B, 1, 8, 8\) for this model, got \(2, 3, 8, 8\)"),
        (latents(2, 1, 8, 9), r"latents must have shape \(B, 1, 8, 8\) for this model, got \(2, 1, 8, 9\)"),
        (latents(0, *SHAPE), "latents hold no samples: the batch is empty; ask for at least one"),
        (
            latents(2, *SHAPE, dtype=torch.float64),
            r"latents must be torch\.float32, the sampler's dtype, got torch\.float64",
        ),
        (
            latents(2, *SHAPE, dtype=torch.float16),
            r"latents must be torch\.float32, the sampler's dtype, got torch\.float16",
        ),
        (latents(2, *SHAPE, dtype=torch.int64), r"float tensor of latents \(B, C, H, W\), got torch\.int64 of shape"),
        (latents(2, *SHAPE, dtype=torch.complex64), r"float tensor of latents \(B, C, H, W\), got torch\.complex64"),
        (latents(2, *SHAPE, device="meta"), "latents are on meta, the sampler on cpu; move them"),
        (spoiled(NAN), r"latents hold NaN or infinite values in rows \[1\]"),
        (spoiled(math.inf), r"latents hold NaN or infinite values in rows \[1\]"),
        (0, "batch must be at least 1 sample, got 0"),
        (-3, "batch must be at least 1 sample, got -3"),
        ([], "got no seeds: the batch is empty; ask for at least one sample"),
        (torch.tensor([], dtype=torch.int64), "got no seeds: the batch is empty"),
        (True, "batch must be a number of samples, a sequence of seeds or a float tensor of latents.*got bool True"),
        (2.0, r"batch must be a number of samples.*got float 2\.0"),
        (None, "batch must be a number of samples.*got NoneType None"),
        ("0-3", "batch must be a number of samples.*got str '0-3'"),
        ({1, 2}, "batch must be a number of samples.*got set"),
        (
            torch.zeros(2, 2, dtype=torch.int64),
            r"batch must be a number of samples.*got torch\.int64 of shape \(2, 2\)",
        ),
        ([-1], r"seed -1 is outside 0 \.\. 2\^32 - 1"),
        ([1, 2**32], r"seed 4294967296 is outside 0 \.\. 2\^32 - 1"),
        ([1.0], r"seeds must be integers, got 1\.0 of type float"),
        (["1"], "seeds must be integers, got '1' of type str"),
        ([True, False], "seeds must be integers, got True of type bool"),
        ([torch.tensor(1.5)], r"seeds must be integers, got tensor\(1\.5000\)"),
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:24]}" if not isinstance(value, torch.Tensor) else None,
)
def test_a_bad_batch(unconditional, batch, message):
    with pytest.raises(ConfigError, match=message):
        unconditional.run(batch)


def labels_of(*values, **options):
    return torch.tensor(values, **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (10, r"class_labels must be in 0 \.\. 9, got 10"),
        (-1, r"class_labels must be in 0 \.\. 9, got -1"),
        ([3, 12], r"class_labels must be in 0 \.\. 9, got 12"),
        ([1, 2, 3], r"one integer, 2 integers or vectors \(2, 10\), got 3 integers"),
        ([3], r"2 integers or vectors \(2, 10\), got 1 integers"),
        ([], r"vectors.*\(2, 10\), got"),
        (True, r"2 integers or vectors \(2, 10\), got torch\.bool of shape \(\)"),
        ([True, False], r"2 integers or vectors \(2, 10\), got torch\.bool of shape \(2,\)"),
        ([1.0, 2.0], r"class_labels as vectors must have shape \(2, 10\), got torch\.float32 \(2,\)"),
        (3.0, r"class_labels as vectors must have shape \(2, 10\), got torch\.float32 \(\)"),
        (torch.zeros(2, 9), r"class_labels as vectors must have shape \(2, 10\), got torch\.float32 \(2, 9\)"),
        (torch.zeros(3, 10), r"class_labels as vectors must have shape \(2, 10\), got torch\.float32 \(3, 10\)"),
        (torch.zeros(2, 9, dtype=torch.int64), r"2 integers or vectors \(2, 10\), got torch\.int64 of shape \(2, 9\)"),
        (torch.full((2, 10), NAN), "class_labels hold NaN or infinite values"),
        (torch.zeros(2, dtype=torch.complex64), r"class_labels must be .*got torch\.complex64 of shape \(2,\)"),
        (torch.zeros(2, 10, dtype=torch.complex64), r"must have shape \(2, 10\), got torch\.complex64"),
        (torch.zeros(2, dtype=torch.uint64), r"class_labels must be .*got torch\.uint64"),
        ("3", "class_labels must be class numbers or vectors, got '3'"),
        (["a", "b"], r"class_labels must be class numbers or vectors, got \['a', 'b'\]"),
        ([[1], [2, 3]], "class_labels must be class numbers or vectors"),
        ({1: 2}, "class_labels must be class numbers or vectors"),
        (2**70, "class_labels must be class numbers or vectors"),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value)[:24],
)
def test_bad_labels(conditional, labels, message):
    with pytest.raises(ConfigError, match=message):
        conditional.run(2, class_labels=labels)


@pytest.mark.parametrize("labels", [3, [3, 4], torch.zeros(2, 10)], ids=["int", "list", "vectors"])
def test_labels_for_an_unconditional_model(unconditional, labels):
    with pytest.raises(ConfigError, match=r"the model is unconditional \(label_dim 0\); leave them out"):
        unconditional.run(2, class_labels=labels)


def test_guidance_for_an_unconditional_model(unconditional):
    with pytest.raises(ConfigError, match="guidance_scale needs a class-conditional model; this one has label_dim 0"):
        unconditional.run(2, guidance_scale=2.0)


@pytest.mark.parametrize(
    "scale", ["2", NAN, math.inf, 1e39, -1000001, 10**400, [2.0], torch.tensor([1.0, 2.0])], ids=repr
)
def test_guidance_that_is_no_number(conditional, scale):
    with pytest.raises(ConfigError, match="guidance_scale must be a finite number of at most 1e\\+06 in size, got"):
        conditional.run(2, guidance_scale=scale)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(3, *SHAPE), r"out must be \(\(2, 1, 8, 8\), torch\.float32.*got \(\(3, 1, 8, 8\), torch\.float32"),
        (torch.zeros(2, 1, 8, 9), r"out must be .*got \(\(2, 1, 8, 9\)"),
        (torch.zeros(2, *SHAPE, dtype=torch.float64), r"out must be .*got \(\(2, 1, 8, 8\), torch\.float64"),
        (torch.zeros(2, *SHAPE, dtype=torch.uint8), r"out must be .*got \(\(2, 1, 8, 8\), torch\.uint8"),
        (torch.zeros(2, *SHAPE, device="meta"), r"out must be .*device\(type='meta'\)"),
        (np.zeros((2, *SHAPE)), r"out must be .*got \(\(2, 1, 8, 8\), torch\.float64"),
        ([0.0], "out must be"),
    ],
    ids=["batch", "width", "float64", "uint8", "meta", "numpy", "list"],
)
def test_an_out_that_does_not_fit(unconditional, out, message):
    with pytest.raises(ConfigError, match=message):
        unconditional.run(2, out=out)


@pytest.mark.parametrize("generator", [0, np.random.default_rng(0)], ids=["int", "numpy"])
def test_a_generator_that_is_none(unconditional, generator):
    with pytest.raises(ConfigError, match=r"generator must be a torch\.Generator, got"):
        unconditional.run(2, generator=generator)


def test_a_number_of_samples_of_unknown_shape(gaussian_denoiser):
    with pytest.raises(ConfigError, match=r"does not say what shape its samples have; pass shape=\(C, H, W\)"):
        Sampler(gaussian_denoiser, solver="euler", nfe=2).run(2)


# ---- Sampler: plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "unknown solver 'rk4'; valid names: euler, heun, dpm, ipndm, deis, dpmpp, unipc, amed"),
        ({"solver": "amed"}, "solver '?[Aa](MED|med)'? needs a predictor"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; valid names: polynomial, logsnr, time_uniform, discrete"),
        ({"schedule": [80.0, 1.0, 0.1]}, "schedule must be a name .*or a tensor|unknown schedule"),
        ({"schedule": np.array([80.0, 1.0, 0.1])}, "schedule must be a name .*or a tensor|unknown schedule"),
        (
            {"schedule": "discrete"},
            "is spaced over the training steps of a network, and this one is known to have none",
        ),
        ({"solver": "heun", "solver_options": {"order": 2}}, "solver 'heun' has no option order; valid options: none"),
        ({"solver": "ipndm", "solver_options": {"order": 2}}, "has no option order; valid options: max_order"),
        ({"solver_options": {"max_order": 2}}, "solver_options need a solver; pass solver=... as well"),
        ({"nfe": 0}, "nfe must be a positive integer, got 0"),
        ({"nfe": -5}, "nfe must be a positive integer, got -5"),
        ({"nfe": True}, "nfe must be a positive integer, got True"),
        ({"nfe": 5.0}, r"nfe must be a positive integer, got 5\.0"),
        ({"nfe": "5"}, "nfe must be a positive integer, got '5'"),
        (
            {"solver": "heun", "nfe": 5, "afs": False},
            r"heun spends 2 evaluations per interval: nfe=5 is not a whole number of intervals; possible are 2, 4, 6",
        ),
        (
            {"solver": "heun", "nfe": 4, "afs": True},
            r"heun spends 2 evaluations per interval, the first one free: nfe=4 is not .*possible are 1, 3, 5",
        ),
        ({"rho": -1.0}, r"rho must be a positive number or None, got -1\.0"),
        ({"rho": "7"}, "rho must be a positive number or None, got '?7"),
        ({"afs": "yes"}, "afs must be True, False, 'mean' or None, got 'yes'"),
        ({"sigma_min": 5.0, "sigma_max": 2.0}, r"need sigma_min < sigma_max, got 5\.0 and 2\.0"),
        ({"sigma_min": NAN}, "sigma_min must be a noise level, .* got nan"),
        (
            {"dtype": torch.float16},
            r"dtype is the state's and must be torch\.float32 or torch\.float64, got torch\.float16",
        ),
        ({"dtype": torch.bfloat16}, r"must be torch\.float32 or torch\.float64, got torch\.bfloat16"),
        ({"dtype": "float32"}, r"must be torch\.float32 or torch\.float64, got 'float32'"),
        ({"device": "gpu"}, "unknown device 'gpu'; pass e.g. 'cpu' or 'cuda:0'"),
        ({"shape": 64}, "shape must be that of one sample, e.g. .* got 64"),
        ({"shape": (1, 0, 8)}, r"shape must be that of one sample, e.g. .* got \(1, 0, 8\)"),
        ({"shape": "1x8x8"}, "shape must be that of one sample, e.g. .* got '1x8x8'"),
        ({"label_dim": -1}, "label_dim must be the number of classes, 0 for none, got -1"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be(tiny_model, options, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(tiny_model, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda", 0)], ids=str)
def test_cuda_where_there_is_none(tiny_model, device):
    with pytest.raises(
        ConfigError, match=r"device 'cuda.*' was asked for, but torch sees no CUDA device; pass device='cpu'"
    ):
        Sampler(tiny_model, device=device)


def test_a_device_that_torch_was_not_built_for(tiny_model):
    with pytest.raises(ConfigError, match=r"device 'xpu'|device 'mps'"):
        Sampler(tiny_model, device="xpu" if not torch.xpu.is_available() else "mps")


def test_the_index_of_a_device_does_not_matter_where_there_is_one(tiny_model):
    sampler = Sampler(tiny_model, solver="euler", nfe=2, device="cpu:0")
    assert sampler.run(torch.zeros(2, *SHAPE)).images.device.type == "cpu"


SIGMAS = [
    ([1.0, 10.0, 80.0], r"sigmas must decrease, got sigmas\[0\]=1 <= sigmas\[1\]=10; pass make_schedule\(...\)"),
    ([80.0, 10.0, 10.0], r"sigmas must decrease, got sigmas\[1\]=10 <= sigmas\[2\]=10"),
    ([80.0, 10.0, -1.0], r"sigmas must be positive, got sigmas\[2\]=-1; end at the model's sigma_min"),
    ([80.0, 0.0, 0.0], r"sigmas must be positive, got sigmas\[1\]=0"),
    ([80.0, 0.0], r"sigmas must be positive, got sigmas\[1\]=0"),
    ([80.0, NAN, 1.0], r"sigmas must be finite, got sigmas\[1\]=nan"),
    ([math.inf, 1.0], r"sigmas must be finite, got sigmas\[0\]=inf"),
    ([80.0, 1.0, NAN], r"sigmas must be finite, got sigmas\[2\]=nan"),
    ([[80.0, 1.0]], r"sigmas must be a vector of at least 2 noise levels, got shape \(1, 2\)"),
    ([80.0], r"sigmas must be a vector of at least 2 noise levels, got shape \(1,\)"),
    ([], r"sigmas must be a vector of at least 2 noise levels, got shape \(0,\)"),
    (80.0, r"sigmas must be a vector of at least 2 noise levels, got shape \(\)"),
]


@pytest.mark.parametrize(("sigmas", "message"), SIGMAS, ids=lambda value: str(value)[:30])
def test_noise_levels_that_cannot_be(tiny_model, gaussian_denoiser, sigmas, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(tiny_model, solver="euler", schedule=torch.tensor(sigmas))
    with pytest.raises(ConfigError, match=message):
        sample(gaussian_denoiser, torch.zeros(2, *SHAPE), torch.tensor(sigmas), make_solver("euler"))


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("ipndm", {"max_order": 0}, "ipndm: max_order must be an integer from 1 to 4, got 0"),
        ("ipndm", {"max_order": 5}, "ipndm: max_order must be an integer from 1 to 4, got 5"),
        ("ipndm", {"max_order": 2.0}, r"ipndm: max_order must be an integer from 1 to 4, got 2\.0"),
        ("ipndm", {"max_order": True}, "ipndm: max_order must be an integer from 1 to 4, got True"),
        ("deis", {"max_order": 0}, "deis: max_order must be an integer from 1 to 4, got 0"),
        ("deis", {"max_order": 5}, "deis: max_order must be an integer from 1 to 4, got 5"),
        ("deis", {"deis_mode": "rho"}, "deis: deis_mode must be one of tab, rhoab; got 'rho'"),
        ("dpmpp", {"max_order": 4}, "dpmpp: max_order must be an integer from 1 to 3, got 4"),
        ("dpmpp", {"predict_x0": 1}, "dpmpp: predict_x0 must be True or False, got 1"),
        ("dpmpp", {"thresholding": "no"}, "dpmpp: thresholding must be True or False, got 'no'"),
        ("dpmpp", {"lower_order_final": None}, "dpmpp: lower_order_final must be True or False, got None"),
        ("unipc", {"max_order": 0}, "unipc: max_order must be an integer from 1 to 3, got 0"),
        ("unipc", {"max_order": 4}, "unipc: max_order must be an integer from 1 to 3, got 4"),
        ("unipc", {"variant": "bh3"}, "unipc: variant must be one of bh1, bh2; got 'bh3'"),
        ("dpm", {"r": 0.0}, r"dpm: r must be in \(0, 1\], got 0\.0"),
        ("dpm", {"r": 1.5}, r"dpm: r must be in \(0, 1\], got 1\.5"),
        ("dpm", {"r": NAN}, r"dpm: r must be in \(0, 1\], got nan"),
        ("dpm", {"r": "half"}, r"dpm: r must be in \(0, 1\], got 'half'"),
        ("amed", {"points": 0}, "amed: points must be an integer from 1 to 7, got 0"),
        ("amed", {"points": 9}, "amed: points must be an integer from 1 to 7, got 9"),
        ("euler", {"max_order": 1}, "solver 'euler' has no option max_order; valid options: none"),
    ],
)
def test_solver_options_out_of_range(solver, options, message):
    with pytest.raises(ConfigError, match=message):
        make_solver(solver, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("cosine", 5, 0.002, 80),
            "unknown schedule 'cosine'; valid names: polynomial, logsnr, time_uniform, discrete",
        ),
        (("polynomial", 1, 0.002, 80), r"num_steps counts noise levels and must be at least 2 \(one interval\), got 1"),
        (("polynomial", 5, 80, 0.002), "need 0 < sigma_min < sigma_max, both finite; got sigma_min=80"),
        (("polynomial", 5, 0, 80), "need 0 < sigma_min < sigma_max, both finite; got sigma_min=0"),
        (("polynomial", 5, 0.002, math.inf), "need 0 < sigma_min < sigma_max, both finite; .* sigma_max=inf"),
        (("polynomial", 5, NAN, 80), "need 0 < sigma_min < sigma_max, both finite; got sigma_min=nan"),
        (("polynomial", 5, 0.002, 80, 0), "rho must be a positive number or None, got 0"),
        (("polynomial", 5, 0.002, 80, NAN), "rho must be a positive number or None, got nan"),
        (("polynomial", 5, 0.002, 80, 1e-3), "rho must leave 5 noise levels apart in float64, got 0.001"),
        (("polynomial", 5, 0.002, 80, 8e-3), "rho must leave 5 noise levels apart"),
        (("time_uniform", 5, 0.002, 80, 1e300), "rho must leave 5 noise levels apart"),
        (("discrete", 5, 0.002, 80), "needs alphas_cumprod, the model's cumulative product of 1 - beta"),
        (("discrete", 5, 0.002, 80, None, torch.tensor([0.9, 0.95])), "alphas_cumprod must decrease"),
        (("discrete", 5, 0.002, 80, None, torch.tensor([1.0, 0.5])), r"numbers inside \(0, 1\)"),
        (("discrete", 5, 0.002, 80, None, torch.tensor([0.5])), r"vector of at least 2 numbers .* got shape \(1,\)"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_schedules_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule(*arguments)


# ---- models


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (5, "model must be a zoo name, a path, an nn.Module, an ExportedProgram or a callable, got int"),
        (None, "model must be a zoo name, .* got NoneType"),
        (torch.zeros(3), "model must be a zoo name, .* got Tensor"),
        ("nosuch", "unknown model 'nosuch': no such file, and bundled models are: "),
        ("nosuch.safetensors", r"unknown model 'nosuch\.safetensors': no such file"),
        ("", r"model\.safetensors does not exist or is not a file"),
    ],
    ids=["int", "None", "tensor", "name", "path", "empty"],
)
def test_models_of_another_kind(model, message):
    with pytest.raises(AmedError, match=message):
        Sampler(model, shape=SHAPE)


@pytest.mark.parametrize("suffix", ["", ".pt2", ".onnx", ".safetensors"])
def test_a_fifo_is_no_model_and_nobody_waits_for_its_writer(tmp_path, suffix):
    os.mkfifo(tmp_path / f"x{suffix}")
    readers = {"": [], ".pt2": [load_compiled, load_program, load_package], ".onnx": [load_onnx, load_package]}
    for read in (partial(Sampler, shape=SHAPE), *readers.get(suffix, [])):
        with pytest.raises(FileFormatError, match=r"x(\.\w+)? is (a FIFO, expected a file|not a file)"):
            read(tmp_path / f"x{suffix}")


def test_an_unknown_model_comes_with_the_bundled_names(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setattr("amed_engine.zoo.ROOT", tmp_path)
    for name in ("letters", "digits"):
        save_model(tiny_model, tmp_path / name)
    with pytest.raises(ConfigError, match=r"unknown model 'faces'.*bundled models are: digits, letters"):
        Sampler("faces")
    with pytest.raises(ConfigError, match="unknown model 'faces'; bundled models: digits, letters"):
        load("faces")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pt", b"junk" * 99, r"model\.pt is no TorchScript file \(.*known forms: TorchScript \(\.pt\)"),
        ("model.pt", b"", r"model\.pt is no TorchScript file"),
        ("model.pkl", b"\x80\x04\x95.", r"model\.pkl is no TorchScript file"),
        ("model.pt2", b"junk" * 99, r"model\.pt2 is no ExportedProgram file"),
        ("model.pt2", b"", r"model\.pt2 is no ExportedProgram file"),
        ("model.safetensors", b"junk" * 99, r"model\.safetensors"),
    ],
)
def test_model_files_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AmedError, match=message):
        Sampler(tmp_path / name, shape=SHAPE)


def test_a_pickle_is_not_executed(tmp_path):
    """torch.save'd modules are programs: whatever the name of the file, they are refused."""

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for name in ("model.pt", "model.pt2", "model.pkl", "model.pth"):
        torch.save(Payload(), tmp_path / name)
        with pytest.raises(AmedError, match="known forms"):
            Sampler(tmp_path / name, shape=SHAPE)
    assert not (tmp_path / "executed").exists()


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(
        FileFormatError, match=r"model\.safetensors does not exist or is not a file; pass a \.safetensors"
    ):
        Sampler(tmp_path)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x[:1], r"the model returned shape \(1, 1, 8, 8\) for an input of \(2, 1, 8, 8\)"),
        (lambda x: x[..., :4], r"the model returned shape \(2, 1, 8, 4\)"),
        (lambda x: torch.cat([x, x], 1), r"the model returned shape \(2, 2, 8, 8\)"),
        (lambda x: x.mean(), r"the model returned shape \(\)"),
        (lambda x: None, r"must return D or \(D, features\) as tensors, got NoneType"),
        (lambda x: {"sample": x}, r"must return D or \(D, features\) as tensors, got dict"),
        (lambda x: x.numpy(), r"must return D or \(D, features\) as tensors, got ndarray"),
        (lambda x: (x, x, x), r"must return D or \(D, features\) as tensors, got tuple"),
        (lambda x: (), r"must return D or \(D, features\) as tensors, got tuple"),
    ],
    ids=["batch", "width", "channels", "number", "None", "dict", "numpy", "triple", "empty"],
)
def test_models_that_answer_wrongly(answer, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(lambda x, sigma: answer(x), solver="heun", nfe=4, shape=SHAPE).run(2)


@pytest.mark.parametrize(
    "features", [torch.zeros(2, 5), torch.zeros(2, 5, 8, 4), torch.zeros(2, 5, 3)], ids=lambda f: f.dim()
)
def test_features_that_the_predictor_cannot_read(gaussian_denoiser, features):
    sampler = Sampler(lambda x, sigma: (gaussian_denoiser(x, sigma), features), AMEDPredictor(), shape=SHAPE)
    with pytest.raises(
        ConfigError, match=r"expects bottleneck features \(B, C, 8, 8\), got .*made for another network"
    ):
        sampler.run(2)


# ---- predictors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 7}, "this predictor was trained for nfe=5, got nfe=7; leave nfe out, or train one"),
        ({"nfe": 0}, "this predictor was trained for nfe=5, got nfe=0"),
        ({"solver": "ipndm"}, "this predictor was trained for solver=amed, got solver=ipndm"),
        ({"schedule": "logsnr"}, "this predictor was trained for schedule=time_uniform, got schedule=logsnr"),
        ({"rho": 3.0}, r"this predictor was trained for rho=None, got rho=3\.0"),
        ({"afs": False}, "this predictor was trained for afs=True, got afs=False"),
        ({"schedule": torch.tensor([80.0, 8.0, 1.0, 0.1])}, "trained for other noise levels than the schedule given"),
        ({"solver_options": {"points": 2}}, r"trained for solver options \{'points': 1\}, got \{'points': 2\}"),
        ({"sigma_max": 10.0}, "this predictor was trained for .*sigma_max|other noise levels"),
        ({"sigma_min": 0.1}, "this predictor was trained for .*sigma_min|other noise levels"),
    ],
    ids=str,
)
def test_a_predictor_for_another_plan(tiny_model, options, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(tiny_model, trained_for(tiny_model), **options)


def test_a_predictor_for_another_model(tiny_model, tiny_conditional):
    with pytest.raises(
        ConfigError,
        match=r"trained for another model \(or other weights or another wrapping of it\): the fingerprints differ",
    ):
        Sampler(tiny_conditional, trained_for(tiny_model))
    predictor = trained_for(tiny_model)
    with torch.no_grad():
        next(tiny_model.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ConfigError, match=r"fingerprints differ; .* verify=False to use it all the same"):
        Sampler(tiny_model, predictor)


def test_a_predictor_for_another_bottleneck(tiny_model):
    with pytest.raises(ConfigError, match=r"reads bottlenecks of 8x8, the model's are 4x4: it was made for another"):
        Sampler(tiny_model, AMEDPredictor(), verify=False)


def test_a_predictor_without_a_fingerprint_for_other_noise_levels(tiny_model):
    """As published predictors are."""
    tiny_model.sigma_max = 10.0
    predictor = trained_for(tiny_model)
    predictor.plan = replace(predictor.plan, model=None)
    with pytest.raises(ConfigError, match=r"noise levels 80 to 0\.002, the model for 10 to 0\.002: .*verify=False"):
        Sampler(tiny_model, predictor)
    assert Sampler(tiny_model, predictor, verify=False).run(1).nfe == 5


def test_a_predictor_for_another_guidance(tiny_conditional):
    unguided = Sampler(tiny_conditional, trained_for(tiny_conditional))
    with pytest.raises(
        ConfigError, match=r"trained with guidance_scale=None, got 2\.0; pass that value, or train one with"
    ):
        unguided.run(2, guidance_scale=2.0)
    guided = Sampler(tiny_conditional, trained_for(tiny_conditional, guidance_scale=2.0))
    with pytest.raises(ConfigError, match=r"trained with guidance_scale=2\.0, got None"):
        guided.run(2)


def test_a_predictor_whose_plan_has_no_place_for_it(tiny_model):
    """Such a plan would count half of the evaluations."""
    with pytest.raises(ConfigError, match="midpoint"):
        Sampler(tiny_model, trained_for(tiny_model, solver="ipndm", options=(), midpoint=False))


def test_a_solver_that_takes_no_predictor(tiny_model):
    with pytest.raises(ConfigError, match="takes no predictor; use amed, or a plugin on euler, dpm, ipndm"):
        Sampler(tiny_model, AMEDPredictor(), solver="heun")


@pytest.mark.parametrize(
    "predictor", [5, nn.Linear(1, 1), [Midpoint(torch.tensor(0.5))]], ids=["int", "module", "list"]
)
def test_predictors_of_another_kind(tiny_model, predictor):
    with pytest.raises(ConfigError, match="predictor must be one of this package"):
        Sampler(tiny_model, predictor)


def test_a_predictor_file_that_is_not_there(tiny_model, tmp_path):
    with pytest.raises(FileFormatError, match=r"p\.safetensors does not exist or is not a file"):
        Sampler(tiny_model, tmp_path / "p.safetensors")


def test_a_truncated_predictor_file(tiny_model, tmp_path):
    path = tmp_path / "p.safetensors"
    save_predictor(trained_for(tiny_model), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FileFormatError, match=r"p\.safetensors is not a readable safetensors file.*truncated"):
        Sampler(tiny_model, path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale_dir": 1.0}, r"scale_dir must be in \[0, 1\), got 1\.0"),
        ({"scale_dir": NAN}, r"scale_dir must be in \[0, 1\), got nan"),
        ({"scale_time": -0.1}, r"scale_time must be in \[0, 1\), got -0\.1"),
        ({"bottleneck": (8,)}, r"bottleneck must be two positive sizes \(h, w\), got \(8,\)"),
        ({"bottleneck": (0, 8)}, r"bottleneck must be two positive sizes \(h, w\), got \(0, 8\)"),
        ({"bottleneck": 8}, r"bottleneck must be two positive sizes \(h, w\), got 8"),
        ({"embedding_dim": 7}, "embedding_dim must be even and at least 4, got 7"),
        ({"embedding_dim": 2}, "embedding_dim must be even and at least 4, got 2"),
    ],
    ids=str,
)
def test_predictors_that_cannot_be_built(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AMEDPredictor(**arguments)


# ---- the plain loop


def test_the_loop_refuses_what_it_cannot_run(gaussian_denoiser):
    x, sigmas = torch.zeros(2, *SHAPE), torch.tensor([80.0, 8.0, 1.0])
    with pytest.raises(ConfigError, match=r"x must be a floating-point tensor, got torch\.int64"):
        sample(gaussian_denoiser, x.long(), sigmas, make_solver("euler"))
    with pytest.raises(ConfigError, match=r"needs a predictor: one that amed_engine\.fit or distill made"):
        sample(gaussian_denoiser, x, sigmas, make_solver("amed"))
    with pytest.raises(ConfigError, match="takes no predictor"):
        sample(gaussian_denoiser, x, sigmas, make_solver("heun"), AMEDPredictor())
    with pytest.raises(
        ConfigError, match="got a predictor of 1 intervals for 2 intervals; pass one entry per interval"
    ):
        sample(gaussian_denoiser, x, sigmas, make_solver("amed"), [Midpoint(torch.tensor(0.5))])


# ---- all of them


def test_every_error_can_be_caught_as_one_and_as_a_value_error():
    for error in (ConfigError, FileFormatError):
        assert issubclass(error, AmedError)
        assert issubclass(error, ValueError)
    with pytest.raises(AmedError):
        parse_seeds("a")


def test_a_refusal_costs_no_evaluation(tiny_conditional):
    calls = []
    tiny_conditional.register_forward_hook(lambda *_: calls.append(1))
    sampler = Sampler(tiny_conditional, solver="euler", nfe=2)
    for arguments in (
        {"batch": [2**32]},
        {"batch": spoiled(NAN)},
        {"batch": 2, "class_labels": 10},
        {"batch": 2, "out": torch.zeros(3)},
    ):
        with pytest.raises(ConfigError):
            sampler.run(**arguments)
    assert calls == []
