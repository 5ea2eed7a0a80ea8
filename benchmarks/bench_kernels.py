"""`combine` and `midpoint` against plain torch, torch.compile and each other: time, bandwidth, share of a plain copy's.

pytest benchmarks/bench_kernels.py --benchmark-only [-m "not gpu"]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from contestants import graphed
from harness import Contestant, Unavailable, compete
from torch import Tensor

from amed_engine import AMEDPredictor, kernels
from amed_engine.kernels import MidpointWeights, cuda, native

SIGMA, SIGMA_NEXT = 2.0, 1.0
Sources = list[Tensor]

UNFUSED = "unfused torch"
COPY = "copy"  # of one tensor: the bandwidth that others are held against


@dataclass(frozen=True)
class Update:
    """One update: how published code writes it, and the coefficients that say the same."""

    unfused: Callable[..., Sequence[Tensor]]
    coeffs: Callable[[Tensor], list[list[Tensor]]]  # per-sample noise levels (B,) -> [output][source]


def to_midpoint(s: Tensor, x: Tensor, denoised: Tensor) -> Sequence[Tensor]:
    d = (x - denoised) / s
    return [x + (SIGMA_NEXT - s) * d]


def to_next(s: Tensor, x: Tensor, y: Tensor, denoised: Tensor) -> Sequence[Tensor]:
    d = (y - denoised) / s
    return [x + 1.01 * (SIGMA_NEXT - s) * d]


def two_step(s: Tensor, x: Tensor, denoised: Tensor, older: Tensor) -> Sequence[Tensor]:
    d = (x - denoised) / s
    return [d, x + (SIGMA_NEXT - s) * (1.5 * d - 0.5 * older)]


def _to_midpoint(s: Tensor) -> list[list[Tensor]]:
    h = SIGMA_NEXT - s
    return [[1 + h / s, -h / s]]


def _to_next(s: Tensor) -> list[list[Tensor]]:
    slope = 1.01 * (SIGMA_NEXT - s) / s
    return [[torch.ones_like(s), slope, -slope]]


def _two_step(s: Tensor) -> list[list[Tensor]]:
    h = SIGMA_NEXT - s
    return [[1 / s, -1 / s, torch.zeros_like(s)], [1 + 1.5 * h / s, -1.5 * h / s, -0.5 * h]]


UPDATES = {
    "to-midpoint": Update(to_midpoint, _to_midpoint),
    "to-next": Update(to_next, _to_next),
    "two-step": Update(two_step, _two_step),
}
CPU_SHAPES = ((1, 3, 32, 32), (64, 3, 64, 64))
GPU_SHAPES = ((256, 4, 256, 256), (64, 3, 64, 64), (1, 3, 32, 32), (8, 4, 64, 64))  # in order of importance
BATCHES = (1, 8, 64, 256)
FEATURES = (256, 8, 8)  # the bottleneck of the CIFAR-10 network
Case = tuple[str, str, tuple[int, ...]]  # operation, update, shape


def cases(device: torch.device, *, tiny: bool = False) -> list[Case]:
    """The larger half of the shapes, then the predictor, then the rest: for when time runs out."""
    shapes = ((2, 3, 8, 8),) if tiny else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    batches = (2,) if tiny else BATCHES if device.type == "cuda" else BATCHES[:3]
    updates = [("combine", name, shape) for shape in shapes for name in UPDATES]
    half = len(updates) // 2
    return [*updates[:half], *(("midpoint", "predictor", (batch, *FEATURES)) for batch in batches), *updates[half:]]


def label(case: Case) -> str:
    return f"{case[0]}-{case[1]}-{'x'.join(map(str, case[2]))}"


def run(case: Case, device: torch.device, *, compiled: bool = True, **options: Any) -> dict[str, dict[str, Any]]:
    """Rows of all contestants of one case, with bytes moved, GB/s and the share of a copy's bandwidth."""
    kind, name, shape = case
    with torch.no_grad():
        if kind == "combine":
            contestants, traffic = _combine_contestants(UPDATES[name], shape, device, compiled)
        else:
            contestants, traffic = _midpoint_contestants(shape, device, compiled)
        rows = compete(contestants, device, **options)
    for who, row in rows.items():
        if "seconds" in row:
            row["bytes"] = traffic[1] if who == COPY else traffic[0]
            row["GB/s"] = row["bytes"] / row["seconds"] / 1e9
    copied, unfused = (rows.get(who, {}).get("seconds") for who in (COPY, UNFUSED))
    for row in rows.values():
        if copied and "seconds" in row:
            row["of_copy"] = row["GB/s"] / rows[COPY]["GB/s"]
        if unfused and "seconds" in row:
            row["over_unfused"] = unfused / row["seconds"]
    return rows


# ---- combine


def _combine_contestants(
    update: Update, shape: tuple[int, ...], device: torch.device, compiled: bool
) -> tuple[list[Contestant], tuple[int, int]]:
    levels = torch.linspace(SIGMA, SIGMA + 1, shape[0], device=device)
    coeffs = torch.stack([torch.stack(row) for row in update.coeffs(levels)])  # (M, J, B)
    rows, columns = coeffs.shape[:2]
    one = 4 * torch.Size(shape).numel()
    sets = _rotation((rows + columns) * one, device)
    generator = torch.Generator(device).manual_seed(0)
    buffers = [[torch.randn(shape, generator=generator, device=device) for _ in range(columns)] for _ in range(sets)]
    s = levels.reshape(-1, *[1] * (len(shape) - 1))

    def fused(sources: Sources) -> Sequence[Tensor]:
        return kernels.combine(sources, coeffs)

    def copy(sources: Sources) -> Sequence[Tensor]:
        return [sources[0].clone()]

    def unfused(sources: Sources) -> Sequence[Tensor]:
        return update.unfused(s, *sources)

    calls = _calls((rows + columns) * one, sets, device)
    rotating = _Rotating(buffers, calls, device)
    listed = [
        Contestant(UNFUSED, rotating(unfused), calls),
        Contestant(COPY, rotating(copy), calls, tolerance=None),
        *(Contestant(f"amed {name}", rotating(fused, name), calls) for name in _implementations(device)),
    ]
    if compiled:
        program = torch.compile(unfused, dynamic=False)
        listed.append(Contestant("torch.compile", rotating(program), calls, seconds=10))
    return listed, ((rows + columns) * one, 2 * one)


# ---- midpoint


def _midpoint_contestants(
    shape: tuple[int, ...], device: torch.device, compiled: bool
) -> tuple[list[Contestant], tuple[int, int]]:
    batch = shape[0]
    one = 4 * torch.Size(shape).numel()
    sets = _rotation(one, device)
    torch.manual_seed(0)
    predictor = AMEDPredictor(scale_dir=0.01, scale_time=0.2, bottleneck=(shape[2], shape[3])).to(device)
    predictor.requires_grad_(False)
    state = predictor.state_dict()
    weights = MidpointWeights(**{name: state[name.replace("_weight", ".weight").replace("_bias", ".bias")]
                                 for name in MidpointWeights._fields})  # fmt: skip
    buffers = [[torch.randn(shape, device=device)] for _ in range(sets)]
    sigma, sigma_next = torch.full((batch,), SIGMA, device=device), torch.full((batch,), SIGMA_NEXT, device=device)

    def fused(sources: Sources) -> Sequence[Tensor]:
        step = kernels.midpoint(sources[0], sigma, sigma_next, weights, 0.01, 0.2)
        return [step.to_next]

    def unfused(sources: Sources) -> Sequence[Tensor]:
        r, scale_dir, _ = predictor(sources[0], sigma, sigma_next)
        slope = scale_dir * (sigma_next - sigma) / (sigma_next**r * sigma ** (1 - r))
        return [torch.stack([torch.ones_like(slope), slope, -slope])[None]]

    calls = _calls(one, sets, device)
    rotating = _Rotating(buffers, calls, device)
    listed = [
        Contestant(UNFUSED, rotating(unfused), calls),
        *(Contestant(f"amed {name}", rotating(fused, name), calls) for name in _implementations(device)),
    ]
    if compiled:
        program = torch.compile(unfused, dynamic=False)
        listed.append(Contestant("torch.compile", rotating(program), calls, seconds=20))
    return listed, (one, one)


# ---- what both need


def _implementations(device: torch.device) -> tuple[str, ...]:
    return ("reference", "triton", "cuda") if device.type == "cuda" else ("reference", "native")


def _why_not(name: str) -> str:
    return {"native": native.why_not, "cuda": cuda.why_not}.get(name, lambda: "")()


def _rotation(traffic: int, device: torch.device) -> int:
    """How many sets of buffers keep the cache cold: together more than twice the L2. One on the CPU, as in a sampler."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 2 * cache // traffic + 2


def _calls(traffic: int, sets: int, device: torch.device) -> int:
    """Calls in one measurement: every set of buffers once, and long enough for the clock."""
    if device.type == "cuda":
        return max(sets, 10)
    return max(1, min(200, 200_000_000 // traffic))


class _Rotating:
    """From one call on one set of buffers to what is timed: many calls over all sets, one graph on a GPU."""

    def __init__(self, buffers: list[Sources], calls: int, device: torch.device):
        self.buffers, self.calls, self.device = buffers, calls, device

    def __call__(self, call: Callable[[Sources], Sequence[Tensor]], implementation: str | None = None):
        def setup() -> Callable[[], Tensor]:
            if implementation and (reason := _why_not(implementation)):
                raise Unavailable(reason)
            work = self._many(call, implementation)
            return graphed(work) if self.device.type == "cuda" else work

        return setup

    def _many(self, call: Callable[[Sources], Sequence[Tensor]], implementation: str | None) -> Callable[[], Tensor]:
        turns = list(itertools.islice(itertools.cycle(self.buffers), self.calls - 1))

        def work() -> Tensor:
            # The first set last, so that every contestant's result is of the same input.
            for sources in turns:
                call(sources)
            return call(self.buffers[0])[-1]

        if implementation is None:
            return work

        def forced() -> Tensor:
            with kernels.use(implementation):
                return work()

        return forced


# ---- pytest


NAMES = {
    "cpu": (UNFUSED, COPY, "amed reference", "amed native", "torch.compile"),
    "cuda": (UNFUSED, COPY, "amed reference", "amed triton", "amed cuda", "torch.compile"),
}


def _parameters() -> Iterator[Any]:
    """Contestants of a case one after the other: they are measured together."""
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        for case in cases(device):
            for name in NAMES[device.type]:
                if name != COPY or case[0] == "combine":
                    marks = [pytest.mark.gpu] if device.type == "cuda" else []
                    yield pytest.param(device, case, name, id=f"{device.type}-{label(case)}-{name}", marks=marks)


@pytest.mark.parametrize(("device", "case", "contestant"), list(_parameters()))
def test_kernel(device, case, contestant, measured, report):
    # Compiling takes longer than all the rest on a CPU: one shape of each kind is enough there.
    compiled = device.type == "cuda" or case[2] in ((64, 3, 64, 64), (64, *FEATURES))
    rows = measured("kernels", device, label(case), lambda: run(case, device, compiled=compiled))
    report(f"{device.type} {label(case)}", rows, contestant)
