"""What a run tells its caller: after each interval, at the end, and when something went wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from amed_engine.engine.request import Request
from amed_engine.errors import ConfigError, NonFiniteError
from amed_engine.solvers.plan import Plan

Observer = Callable[[int, Tensor], None]  # (interval, state at its end)


class StepInfo(NamedTuple):
    """What a callback gets after each interval: step 1 .. steps, and the state x at noise level sigma."""

    step: int
    steps: int
    sigma: float
    x: Tensor


@dataclass(frozen=True)
class SampleResult:
    """Images (B, C, H, W) in the sampler's dtype, a tensor unless `output_type` says otherwise, and how they came about.

    seeds: one per image, None for latents the caller gave. labels: class indices or the given vectors, None for an
    unconditional model. nfe: network evaluations per image. backend: what ran, "graph" or "eager", a package's format, or
    "ticks" for rows of a `ContinuousSampler`.
    chunks: 1, or more where memory was short.
    """

    images: Tensor
    nfe: int
    seeds: list[int] | None
    labels: Tensor | None
    backend: str
    plan: Plan
    chunks: int
    seconds: float  # of the host; a GPU may still be at work
    buckets: tuple[int, ...] = ()  # of ticks: the sizes of the batches that its samples were evaluated in

    def __repr__(self) -> str:
        images = f"{tuple(self.images.shape)} {str(self.images.dtype).removeprefix('torch.')}"
        chunks = f" in {self.chunks} chunks" if self.chunks > 1 else ""
        return f"SampleResult(images {images}, {self.plan.describe()}, backend {self.backend}{chunks}, {self.seconds:.3g} s)"


def make_observer(callback: Callable[[StepInfo], None] | None, progress: bool, plan: Plan) -> Observer | None:
    """What reports intervals to the caller; None where nobody wants to know."""
    if callback is None and not progress:
        return None
    if callback is not None and not callable(callback):
        raise ConfigError(f"callback must be a function of a StepInfo, got {type(callback).__name__}")
    bar = tqdm(total=plan.intervals, desc="sampling", unit="step", leave=False) if progress else None

    def observe(interval: int, x: Tensor) -> None:
        if callback is not None:
            # A copy: a callback may write to what it gets, or keep it.
            callback(StepInfo(interval + 1, plan.intervals, plan.sigmas[interval + 1], x.clone()))
        if bar is not None:
            # A chunk that was tried again starts over.
            bar.n = interval + 1
            bar.refresh()
            if interval + 1 == plan.intervals:
                bar.close()

    return observe


def non_finite(states: list[Tensor], request: Request) -> NonFiniteError:
    """Find the first interval and the samples, from the states that the loop has made anyway."""
    broken = [~torch.isfinite(state).flatten(1).all(1) for state in states]
    step = next(i for i, rows in enumerate(broken) if bool(rows.any()))
    rows = broken[-1].nonzero().flatten().tolist()
    named = [request.first_row + row for row in rows] if request.seeds is None else [request.seeds[row] for row in rows]
    what = "rows" if request.seeds is None else "seeds"
    return NonFiniteError(
        f"samples became NaN or infinite in step {step} of {len(states) - 1}, {what} {named}; check the model's output at that "
        "noise level, and its precision (bfloat16 or float32 instead of float16)",
        step,
        named,
    )
