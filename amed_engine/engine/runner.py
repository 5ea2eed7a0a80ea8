"""Runs programs on requests: by graph where one may be, eagerly otherwise, in smaller pieces where memory is short."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from amed_engine.engine.capture import CudaDevice, capturing, release_cached_memory
from amed_engine.engine.graphs import (
    WARMUPS,
    WARMUPS_TORCHSCRIPT,
    GraphCache,
    Stats,
    WarmupReport,
    check_sizes,
    family_of,
)
from amed_engine.engine.model import Model, bind_labels
from amed_engine.engine.request import Request
from amed_engine.engine.result import Observer, non_finite
from amed_engine.errors import ConfigError
from amed_engine.sampling.loop import integrate
from amed_engine.solvers.program import Program

logger = logging.getLogger("amed_engine")

BACKENDS = ("auto", "graph", "eager")
# TorchScript reports its failures as plain RuntimeErrors, and so does the CPU's allocator.
SHORTAGES = ("CUDA out of memory", "DefaultCPUAllocator")


class Images(NamedTuple):
    """Samples, what ran ("graph", "eager", or "graph+eager" for different pieces), and in how many pieces."""

    images: Tensor
    backend: str
    chunks: int


class Engine:
    """A model on a device with its graphs. backend: "auto" captures on a GPU, "graph" insists on it, "eager" never does."""

    def __init__(
        self, model: Model, device: torch.device, backend: str, batch_sizes: Sequence[int], check_finite: bool
    ):
        if backend not in BACKENDS:
            raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        if backend == "graph" and device.type != "cuda":
            raise ConfigError(f"backend='graph' needs a CUDA device, got {device}; use backend='auto' or 'eager'")
        self.model, self.device, self.backend, self.check_finite = model, device, backend, check_finite
        batch_sizes = check_sizes(batch_sizes)  # without a GPU too: what is wrong there should not wait for one
        self._eager_runs = 0
        self.cache: GraphCache | None = None
        if device.type == "cuda" and backend != "eager":
            scripted = isinstance(model.module, torch.jit.ScriptModule)
            warmups = WARMUPS_TORCHSCRIPT if scripted else WARMUPS
            self.cache = GraphCache(CudaDevice(device), batch_sizes, model.module, warmups, insist=backend == "graph")

    @property
    def stats(self) -> Stats:
        """Captures, replays and eager runs so far."""
        cached = self.cache.stats if self.cache else Stats()
        return Stats(cached.captures, cached.replays, cached.eager_runs + self._eager_runs)

    def may_wait(self) -> bool:
        """Whether tensors on the device may be looked at, which waits for them: not inside a caller's capture."""
        return self.check_finite and not (self.device.type == "cuda" and capturing(self.device))

    @torch.no_grad()
    def warmup(self, program: Program, example: Request, scale: float | None) -> WarmupReport:
        """Capture every batch size for requests like the example."""
        if self.cache is None:
            return WarmupReport("eager")
        family = family_of(scale, example.latents, example.labels, self.model.module)
        return self.cache.warmup(family, BoundLoop(self.model, program, scale), example.latents, example.labels)

    def run(self, program: Program, request: Request, scale: float | None, observe: Observer | None) -> Images:
        """The whole batch, or pieces of half the size each time memory runs out."""
        total = size = len(request.latents)
        pieces: list[Tensor] = []
        ran: set[str] = set()
        start = 0
        while start < total:
            try:
                images, how = self._draw(program, request.rows(start, start + size), scale, observe)
            except RuntimeError as error:
                # Whoever insists on graphs is told, and gets no smaller pieces without them.
                if not _is_out_of_memory(error) or size == 1 or self.backend == "graph":
                    raise
                if size == total:
                    warnings.warn(_short_of_memory(total), RuntimeWarning, stacklevel=3)
                size = (size + 1) // 2
                release_cached_memory()
                continue
            pieces.append(images)
            ran.add(how)
            start += size
        return Images(
            pieces[0] if len(pieces) == 1 else torch.cat(pieces), "+".join(sorted(ran, reverse=True)), len(pieces)
        )

    @torch.no_grad()
    def _draw(
        self, program: Program, request: Request, scale: float | None, observe: Observer | None
    ) -> tuple[Tensor, str]:
        # Intervals can only be observed one by one.
        images, how = (None, "eager") if observe is not None else self._by_graph(program, request, scale)
        if images is not None and (not self.check_finite or _finite(images)):
            return images, how
        # Also after a broken replay: the eager states tell the step.
        self._eager_runs += 1
        with torch.autocast(self.device.type, enabled=False):
            states = integrate(
                program, bind_labels(self.model, request.labels, scale), request.latents * program.sigmas[0], observe
            )
        if self.check_finite and not _finite(states[-1]):
            raise non_finite(states, request)
        return states[-1], "eager"

    def _by_graph(self, program: Program, request: Request, scale: float | None) -> tuple[Tensor | None, str]:
        """What the cache makes of the batch; None where there is no cache, or no memory for it."""
        if self.cache is None:
            return None, "eager"
        family = family_of(scale, request.latents, request.labels, self.model.module)
        try:
            return self.cache.run(family, BoundLoop(self.model, program, scale), request.latents, request.labels)
        except torch.OutOfMemoryError:
            if self.backend == "graph":
                raise
            logger.warning("out of memory while capturing: this batch runs eagerly; pass fewer or smaller batch_sizes")
            return None, "eager"


@dataclass(frozen=True)
class BoundLoop:
    """(latents, labels) -> images. Not a closure over the engine: a cycle through a CUDA graph would outlive it."""

    model: Model
    program: Program
    scale: float | None

    def __call__(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        x = latents * self.program.sigmas[0]
        # The predictor's arithmetic is not for a caller's autocast to narrow, in a graph for good.
        with torch.autocast(x.device.type, enabled=False):
            return integrate(self.program, bind_labels(self.model, labels, self.scale), x)[-1]


def _finite(images: Tensor) -> bool:
    return bool(torch.isfinite(images).all())


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SHORTAGES)


def _short_of_memory(batch: int) -> str:
    return f"out of memory for a batch of {batch}: sampling in smaller chunks"
