"""What `combine`, `combine_coeff_grad` and `midpoint` refuse, each before anything is launched."""

import re
from contextlib import nullcontext

import pytest
import torch

from amed_engine import kernels
from amed_engine.kernels import combine, combine_coeff_grad, cuda, midpoint, native, ops

F32 = torch.float32


def sources(count=2, shape=(3, 2, 4, 4), dtype=F32):
    return [torch.ones(shape, dtype=dtype) for _ in range(count)]


def coeffs(rows=1, count=2, batch=3, dtype=F32):
    return torch.ones(rows, count, batch, dtype=dtype)


LONG = torch.ones(3, 2, 4, 4, dtype=torch.int64)
META = torch.ones(3, 2, 4, 4, device="meta")
COMBINE = {
    "no sources": (lambda: combine([], coeffs(count=1)), "1 to 16 tensors, got 0"),
    "too many sources": (lambda: combine(sources(17), coeffs(count=17)), "1 to 16 tensors, got 17"),
    "no outputs": (lambda: combine(sources(), coeffs(rows=0)), "1 to 8 outputs, got 0"),
    "too many outputs": (lambda: combine(sources(), coeffs(rows=9)), "1 to 8 outputs, got 9"),
    "scalar": (lambda: combine(sources(shape=()), coeffs(batch=1)), "batch dimension"),
    "integer source": (lambda: combine([*sources(1), LONG], coeffs()), "sources[1] must be float16"),
    "complex source": (lambda: combine(sources(dtype=torch.complex64), coeffs()), "sources[0] must be float16"),
    "source shape": (
        lambda: combine([*sources(1), torch.ones(3, 2, 4, 5)], coeffs()),
        "like sources[0], got (3, 2, 4, 5)",
    ),
    "source batch": (lambda: combine([*sources(1), torch.ones(1, 2, 4, 4)], coeffs()), "got (1, 2, 4, 4)"),
    "source device": (lambda: combine([*sources(1), META], coeffs()), "sources[1] must be on cpu"),
    "wide source": (lambda: combine([*sources(1), LONG.double()], coeffs()), "sources[1] is float64 but sources[0]"),
    "coeffs rank": (lambda: combine(sources(), torch.ones(2, 3)), "(M, 2, 3) or (M, 2, 1), got (2, 3)"),
    "coeffs columns": (lambda: combine(sources(), coeffs(count=3)), "got (1, 3, 3)"),
    "coeffs batch": (lambda: combine(sources(), coeffs(batch=2)), "got (1, 2, 2)"),
    "coeffs dtype": (
        lambda: combine(sources(), coeffs(dtype=torch.float64)),
        "must be torch.float32 for torch.float32",
    ),
    "narrow coeffs": (
        lambda: combine(sources(dtype=torch.float64), coeffs()),
        "must be torch.float64 for torch.float64",
    ),
    "half coeffs": (lambda: combine(sources(), coeffs(dtype=torch.float16)), "must be torch.float32"),
    "coeffs device": (lambda: combine(sources(), coeffs().to("meta")), "coeffs must be on cpu"),
}


def into(*out, given=None, rows=None):
    given = sources() if given is None else given
    return combine(given, coeffs(rows=len(out) if rows is None else rows), out=list(out))


def shifted(start: int):
    return BASE[start : start + 96].view(3, 2, 4, 4)


BASE = torch.ones(200)
OUT = {
    "count": (lambda: into(torch.ones(3, 2, 4, 4), rows=2), "out must be 2 tensors, one per row of coeffs, got 1"),
    "shape": (lambda: into(torch.ones(3, 2, 4, 5)), "out[0] must be (3, 2, 4, 4)"),
    "dtype": (lambda: into(torch.ones(3, 2, 4, 4, dtype=torch.float16)), "got (3, 2, 4, 4) torch.float16"),
    "device": (lambda: into(META), "on meta"),
    "partial overlap": (
        lambda: into(shifted(1), given=[shifted(0), sources(1)[0]]),
        "out[0] overlaps a source in part",
    ),
    "transposed view": (
        lambda: into(shifted(0).transpose(2, 3), given=[shifted(0), sources(1)[0]]),
        "out[0] overlaps a source in part",
    ),
    "two outputs": (lambda: into(shifted(0), shifted(0)), "out[1] overlaps coeffs or another output"),
    "expanded": (lambda: into(torch.ones(3, 1, 4, 4).expand(3, 2, 4, 4)), "out[0] is expanded"),
    "gradient": (
        lambda: into(torch.ones(3, 2, 4, 4), given=[s.requires_grad_() for s in sources()]),
        "has no gradient",
    ),
}
DOTS = {
    "grads shape": (lambda: combine_coeff_grad(sources(1), sources(2, (3, 2, 4, 5))), "got (3, 2, 4, 5)"),
    "too many grads": (lambda: combine_coeff_grad(sources(9), sources(1)), "grads must be 1 to 8 tensors, got 9"),
    "integer": (lambda: combine_coeff_grad([LONG], sources(1)), "grads[0] must be float16"),
    "wide": (lambda: combine_coeff_grad(sources(1), sources(1, dtype=torch.float64)), "is float64 but"),
}


@pytest.mark.parametrize(
    ("call", "message"), [*COMBINE.values(), *OUT.values(), *DOTS.values()], ids=[*COMBINE, *OUT, *DOTS]
)
@pytest.mark.parametrize("name", ["default", "reference"])
def test_refused(call, message, name, monkeypatch):
    monkeypatch.setattr(ops, "_implementation", lambda device: pytest.fail("launched"))
    with (
        kernels.use(name) if name == "reference" else nullcontext(),
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        call()


def test_nothing_is_written_when_an_argument_is_refused():
    out = [torch.full((3, 2, 4, 4), 7.0), torch.full((3, 2, 4, 5), 7.0)]
    with pytest.raises(ValueError, match="out"):
        combine(sources(), coeffs(rows=2), out=out)
    assert all(torch.equal(target, torch.full_like(target, 7.0)) for target in out)


WEIGHTS = kernels.MidpointWeights(
    *(torch.ones(shape) for shape in [(8, 8), (8,), (16, 25), (16,), (4, 16), (4,), (1, 20), (1,), (1, 20), (1,)])
)
ONE = torch.ones(1)
MAPS = torch.ones(3, 2, 5, 5)


def with_noise(channels: int) -> kernels.MidpointWeights:
    square, heads = torch.ones(channels, channels), torch.ones(1, 4 + 2 * channels)
    return WEIGHTS._replace(
        map_layer0_weight=square, map_layer0_bias=square[0], fc_r_weight=heads, fc_scale_dir_weight=heads
    )


MIDPOINT = {
    "no channels": ((MAPS[:, :0], ONE, ONE, WEIGHTS, 0.1), "must have channels and pixels, got (3, 0, 5, 5)"),
    "no pixels": ((MAPS[..., :0], ONE, ONE, WEIGHTS, 0.1), "must have channels and pixels, got (3, 2, 5, 0)"),
    "empty bottleneck": (
        (None, ONE, ONE, WEIGHTS._replace(enc_layer0_weight=torch.ones(16, 0)), 0.1),
        "and 0 in enc_layer0_weight",
    ),
    "odd noise channels": ((MAPS, ONE, ONE, with_noise(5), 0.1), "even number of noise channels, 4 or more"),
    "two noise channels": ((MAPS, ONE, ONE, with_noise(2), 0.1), "got 2 in map_layer0_weight"),
    "sigma scalar": ((MAPS, torch.tensor(1.0), ONE, WEIGHTS, 0.1), "sigma must have shape (3,) or (1,)"),
    "sigma batch": ((MAPS, torch.ones(2), ONE, WEIGHTS, 0.1), "sigma must have shape (3,) or (1,), got (2,)"),
    "sigma_next batch": ((None, torch.ones(2), torch.ones(3), WEIGHTS, 0.1), "sigma_next must have shape (2,) or (1,)"),
    "sigma dtype": ((MAPS, ONE.half(), ONE.half(), WEIGHTS, 0.1), "sigma must be float32 or float64"),
    "mixed sigmas": ((MAPS, ONE, ONE.double(), WEIGHTS, 0.1), "sigma_next must be float32 or float64 and like sigma"),
    "features rank": ((MAPS[0, 0], ONE, ONE, WEIGHTS, 0.1), "features must be floating (B, C, h, w) or (B, h, w)"),
    "features dtype": ((MAPS.long(), ONE, ONE, WEIGHTS, 0.1), "features must be floating"),
    "bottleneck size": ((torch.ones(3, 2, 8, 8), ONE, ONE, WEIGHTS, 0.1), "enc_layer0_weight must have shape (16, 64)"),
    "weights dtype": ((MAPS, ONE.double(), ONE.double(), WEIGHTS, 0.1), "map_layer0_weight must be torch.float64"),
    "weights device": (
        (MAPS, ONE, ONE, WEIGHTS._replace(fc_r_bias=ONE.to("meta")), 0.1),
        "fc_r_bias must be torch.float32",
    ),
    "features device": ((MAPS.to("meta"), ONE, ONE, WEIGHTS, 0.1), "features must be on cpu"),
    "no r head": (
        (MAPS, ONE, ONE, WEIGHTS._replace(fc_r_weight=None), 0.1),
        "fc_r_weight must have shape (1, 20), got None",
    ),
    "half a head": (
        (MAPS, ONE, ONE, WEIGHTS._replace(fc_scale_dir_bias=None), 0.1),
        "fc_scale_dir_bias must have shape (1,), got None",
    ),
    "head without width": ((MAPS, ONE, ONE, WEIGHTS, 0.0), "scale_dir=0.0 but its head is there"),
    "width without head": ((MAPS, ONE, ONE, WEIGHTS, 0.1, 0.2), "scale_time=0.2 but its head is absent"),
}


@pytest.mark.parametrize(("arguments", "message"), MIDPOINT.values(), ids=list(MIDPOINT))
def test_midpoint_refuses(arguments, message, monkeypatch):
    monkeypatch.setattr(ops, "_implementation", lambda device: pytest.fail("launched"))
    with pytest.raises(ValueError, match=re.escape(message)):
        midpoint(*arguments)


@pytest.mark.parametrize(("name", "device"), [("native", "cuda:0"), ("triton", "cpu"), ("cuda", "cpu")])
def test_addresses_of_another_device_are_never_handed_on(name, device, monkeypatch):
    for module in (native, cuda):
        monkeypatch.setattr(module, "why_not", str)
    with kernels.use(name):
        with pytest.raises(
            ValueError, match=re.escape(f"'{name}' reads {ops._DEVICES[name]} memory, got tensors on {device}")
        ):
            ops._implementation(torch.device(device))
        if device == "cpu":
            for call in (
                lambda: combine(sources(), coeffs()),
                lambda: combine_coeff_grad(sources(1), sources(1)),
                lambda: midpoint(MAPS, ONE, ONE, WEIGHTS, 0.1),
            ):
                with pytest.raises(ValueError, match="got tensors on cpu; move them"):
                    call()


@pytest.mark.parametrize(("noise", "side"), [(66, 5), (8, 111)])
def test_a_predictor_too_large_for_a_block_of_cuda(noise, side, monkeypatch):
    monkeypatch.setattr(cuda, "_launch", lambda *arguments: pytest.fail("launched"))
    shapes = [(noise, noise), (noise,), (16, side * side), (16,), (4, 16), (4,), (1, 4 + 2 * noise), (1,)]
    weights = kernels.MidpointWeights(*(torch.ones(shape) for shape in shapes))
    with pytest.raises(ValueError, match="too large for one block of CUDA"):
        cuda.midpoint_into(torch.ones(1, 2, side, side), ONE, ONE, weights, 0.0, 0.0, torch.empty(10, 1))
