"""From the arguments of `ContinuousSampler.submit` to an order, all of it checked in the caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from amed_engine.engine.arrays import imported
from amed_engine.engine.model import Model
from amed_engine.engine.prepared import Wishes
from amed_engine.engine.request import check_labels, make_request, read_seeds
from amed_engine.engine.runner import BACKENDS
from amed_engine.errors import ConfigError
from amed_engine.sampling.modes import plain_tensors
from amed_engine.serving.order import Order, Sample
from amed_engine.serving.programs import Programmed, Programs
from amed_engine.serving.rows import Rows
from amed_engine.serving.table import MAX_HISTORY
from amed_engine.solvers.arguments import is_finite, is_whole, told


class Orders:
    """Makes orders for one model. wishes of each program: `given` by the engine, and the request's. most: samples of one."""

    def __init__(self, model: Model, programs: Programs, rows: Rows, given: Mapping[str, Any], most: int):
        self.model, self.programs, self.rows, self.given, self.most = model, programs, rows, given, most

    @plain_tensors()  # what is kept for other requests is not for a caller's inference_mode to lock
    def make(
        self,
        batch: Any,
        labels: Any = None,
        *,
        guidance_scale: float | None = None,
        deadline: float | None = None,
        priority: int = 0,
        on_sample: Callable[[Sample], None] | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        **wishes: Any,
    ) -> Order:
        """Arguments as of `ContinuousSampler.submit`. Raises ConfigError, FileFormatError."""
        until = _deadline(deadline)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise ConfigError(f"priority must be an integer, larger first, got {priority!r}")
        if on_sample is not None and not callable(on_sample):
            raise ConfigError(f"on_sample must be a function of a Sample, got {type(on_sample).__name__}")
        if conditions is not None:
            self._check_none_is_known(guidance_scale)
        programmed = self.programs.of(Wishes(**wishes, **self.given), guidance_scale)
        seeds, latents, classes = self._given(batch, labels, programmed, conditions is not None)
        count = len(seeds) if latents is None else len(latents)  # type: ignore[arg-type]
        told = self._conditions(conditions, classes, count, programmed, guidance_scale)
        return Order(
            samples=count,
            ticks=programmed.ticks,
            deadline=until,
            priority=priority,
            arrival=time.monotonic_ns(),
            programmed=programmed,
            scale=guidance_scale,
            seeds=seeds,
            latents=latents,
            classes=classes,
            conditions=told,
            on_sample=on_sample,
        )

    def _given(
        self, batch: Any, labels: Any, programmed: Programmed, conditioned: bool
    ) -> tuple[list[int] | None, Tensor | None, Tensor | None]:
        """Seeds or latents, and classes where they are given."""
        batch, labels = imported("seeds", batch), imported("class_labels", labels)
        _check_count(batch, self.most)
        if isinstance(batch, Tensor) and batch.is_floating_point():
            kind: dict[str, Any] = {"dtype": self.rows.dtype, "device": self.rows.device}
            noises = programmed.program.noises
            request = make_request(self.model, batch.clone(), labels, None, noises=noises, **kind)
            return None, request.latents, None if conditioned and labels is None else request.classes
        seeds = read_seeds(int(batch) if isinstance(batch, Integral) and not isinstance(batch, bool) else batch)
        if labels is None and self.model.continuous:
            raise ConfigError(
                f"class_labels are missing: this model is told {self.model.numbers} per sample, which no seed draws"
            )
        # A copy: the caller's own may change while the request waits.
        return seeds, None, None if labels is None else check_labels(labels, self.model, len(seeds), True).cpu().clone()

    def _check_none_is_known(self, scale: float | None) -> None:
        """Before the model is asked whether it can be guided by class. Raises ConfigError."""
        room = self.rows.conditions
        if room is not None and scale not in (None, 1) and not room.tables.has_null:
            raise ConfigError(
                f"guidance_scale={scale} needs to know what the network is told for no prompt: bind that beside a table, "
                "by wrap(..., conditions={...}, null_conditions={...}); requests bring their own conditions all the same"
            )

    def _conditions(
        self,
        given: Mapping[str, Tensor] | None,
        classes: Tensor | None,
        count: int,
        programmed: Programmed,
        scale: float | None,
    ) -> dict[str, Tensor] | None:
        room = self.rows.conditions
        if given is None:
            if room is not None and not room.tables.count:
                raise ConfigError(
                    f"conditions are missing: the network needs {', '.join(room.tables.names)}; pass conditions={{...}}, or "
                    "bind them with wrap(..., conditions={...})"
                )
            return None
        if room is None:
            raise ConfigError("conditions were given, but this model takes none; leave them out")
        if classes is not None:
            raise ConfigError("give class_labels, which choose bound conditions, or conditions, not both")
        if programmed.table is None:
            raise ConfigError(
                f"conditions of a request go with programs in rows alone, and this is none: {programmed.why_not}; bind them "
                "with wrap(..., conditions={...}), or use another solver"
            )
        if programmed.program.mean is not None:
            raise ConfigError(
                'afs="mean" starts about a mean answer that is not known for new conditions; pass afs=False'
            )
        return room.check(given, count, guided=scale not in (None, 1))


def _check_count(batch: Any, most: int) -> None:
    """Before so many seeds are drawn or read. Raises ConfigError."""
    many = isinstance(batch, Sequence) or (isinstance(batch, Tensor) and batch.dim() > 0)
    count = batch if isinstance(batch, Integral) else len(batch) if many else 0
    if int(count) > most:
        raise ConfigError(
            f"samples: got {told(int(count))}, expected at most {most}, rows and queue; split the request"
        )


def check_settings(*, rows: int, history: int, queue: int, dtype: torch.dtype, backend: str) -> None:
    """Of an engine. Raises ConfigError."""
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"dtype is the state's and must be torch.float32 or torch.float64, got {dtype!r}")
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    bounds = {"rows": (rows, 1, 4096), "history": (history, 1, MAX_HISTORY), "queue": (queue, 0, 1 << 20)}
    for name, (value, low, high) in bounds.items():
        if not is_whole(value, low, high):
            raise ConfigError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def _deadline(seconds: Any) -> float | None:
    """On the engine's clock. Raises ConfigError."""
    if seconds is None:
        return None
    if not is_finite(seconds) or seconds <= 0:
        raise ConfigError(f"deadline must be seconds from now, a positive number, got {told(seconds)}")
    return time.monotonic() + seconds
