"""Runs programs on requests: by graph where one may be, eagerly otherwise, in smaller pieces where memory is short."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.engine.capture import CudaDevice, capturing, release_cached_memory
from amed_engine.engine.graphs import GraphCache, Stats, WarmupReport, check_sizes, graph_key
from amed_engine.engine.model import Model
from amed_engine.engine.request import Request
from amed_engine.engine.result import Observer, non_finite
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import bind_labels, mean_of_labels
from amed_engine.sampling.loop import integrate
from amed_engine.sampling.modes import evaluating
from amed_engine.sampling.offloaded import brings_weights
from amed_engine.solvers.program import Program

logger = logging.getLogger("amed_engine")

BACKENDS = ("auto", "graph", "eager")
# TorchScript reports its failures as plain RuntimeErrors, and so does the CPU's allocator.
SHORTAGES = ("CUDA out of memory", "DefaultCPUAllocator")


class Drawn(NamedTuple):
    """Samples, what ran ("graph", "eager", or "graph+eager" for different pieces), and in how many pieces."""

    images: Tensor
    backend: str
    chunks: int


class Runner:
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
        self.stats = Stats()
        self.cache: GraphCache | None = None
        brings = brings_weights(model.module)
        if brings and backend == "graph":
            raise ConfigError(
                "backend='graph' needs weights that stay where they are; hooks bring this model's for each call, offloaded or "
                "stored in another dtype: use backend='auto' or 'eager'"
            )
        if device.type == "cuda" and backend != "eager" and not brings:
            insist = backend == "graph"
            self.cache = GraphCache(CudaDevice(device), batch_sizes, model.module, insist=insist, stats=self.stats)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides how the network's numbers are rounded, JSON-able. graphs: the sizes of batches in them, None without."""
        model, cache = self.model, self.cache
        return {
            "autocast": None if model.autocast is None else str(model.autocast).removeprefix("torch."),
            "compile": model.compile,
            "memory_format": str(model.memory_format).removeprefix("torch."),
            "graphs": None if cache is None else list(cache.batch_sizes),
        }

    def may_wait(self) -> bool:
        """Whether tensors on the device may be looked at, which waits for them: not inside a caller's capture."""
        return self.check_finite and not (self.device.type == "cuda" and capturing(self.device))

    @torch.no_grad()
    def warmup(self, program: Program, example: Request, scale: float | None) -> WarmupReport:
        """Capture every batch size for requests like the example."""
        if self.cache is None:
            return WarmupReport("eager")
        with evaluating(self.model.module):
            key = graph_key(scale, example.latents, example.labels, self.model.module)
            return self.cache.warmup(key, BoundLoop(self.model, program, scale), *example.all_inputs)

    def run(self, program: Program, request: Request, scale: float | None, observe: Observer | None) -> Drawn:
        """The whole batch, or pieces of half the size each time memory runs out."""
        loop = BoundLoop(self.model, program, scale)
        total = size = len(request.latents)
        pieces: list[Tensor] = []
        ran: set[str] = set()
        start = 0
        while start < total:
            try:
                images, how = self._draw(loop, request.rows(start, start + size), observe)
            except RuntimeError as error:
                # Whoever insists on graphs is told, and gets no smaller pieces without them.
                if not _is_out_of_memory(error) or size == 1 or self.backend == "graph":
                    raise
                if size == total:
                    message = f"out of memory for a batch of {total}: sampling in smaller chunks"
                    warnings.warn(message, RuntimeWarning, stacklevel=3)
                size = (size + 1) // 2
                release_cached_memory()
                continue
            pieces.append(images)
            ran.add(how)
            start += size
        images = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return Drawn(images, "+".join(sorted(ran, reverse=True)), len(pieces))

    @torch.no_grad()
    def _draw(self, loop: BoundLoop, request: Request, observe: Observer | None) -> tuple[Tensor, str]:
        with evaluating(self.model.module):
            return self._drawn(loop, request, observe)

    def _drawn(self, loop: BoundLoop, request: Request, observe: Observer | None) -> tuple[Tensor, str]:
        look = self.may_wait()
        # Intervals can only be observed one by one.
        images = None if observe is not None else self._by_graph(loop, request)
        if images is not None and (not look or _finite(images)):
            return images, "graph"
        # Also after a broken replay: the eager states tell the step.
        self.stats.count("eager_runs")
        states = loop.states(*request.all_inputs, observe)
        if look and not _finite(states[-1]):
            raise non_finite(states, request)
        return states[-1], "eager"

    def _by_graph(self, loop: BoundLoop, request: Request) -> Tensor | None:
        """The images of the batch; None where there is no graph for it, or no memory for one."""
        if self.cache is None:
            return None
        key = graph_key(loop.scale, request.latents, request.labels, self.model.module)
        try:
            return self.cache.run(key, loop, *request.all_inputs)
        except torch.OutOfMemoryError:
            if self.backend == "graph":
                raise
            logger.warning("out of memory while capturing: this batch runs eagerly; pass fewer or smaller batch_sizes")
            return None


@dataclass(frozen=True)
class BoundLoop:
    """(latents[, labels[, noises]]) -> images. Holds no Runner: the cycle through its CUDA graphs would outlive it."""

    model: Model
    program: Program
    scale: float | None

    def __call__(self, latents: Tensor, labels: Tensor | None = None, noises: Tensor | None = None) -> Tensor:
        return self.states(latents, labels, noises)[-1]

    def states(
        self, latents: Tensor, labels: Tensor | None, noises: Tensor | None, observe: Observer | None = None
    ) -> list[Tensor]:
        """What `integrate` returns: the state at each noise level, the images last."""
        x = latents * self.program.sigmas[0]
        denoiser = bind_labels(self.model.denoise, labels, self.scale)
        rows = self.program.mean
        # The predictor's arithmetic is not for a caller's autocast to narrow, in a graph for good.
        with torch.autocast(x.device.type, enabled=False):
            mean = None if rows is None else mean_of_labels(rows, labels, self.scale)
            return integrate(self.program, denoiser, x, observe, mean, () if noises is None else noises.unbind(1))


def _finite(images: Tensor) -> bool:
    return bool(torch.isfinite(images).all())


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SHORTAGES)
