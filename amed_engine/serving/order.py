"""A request on its way: what it asked for, which of its samples are done, and the future that waits for them."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.engine.request import sent
from amed_engine.engine.result import SampleResult
from amed_engine.engine.seeds import draw_all
from amed_engine.errors import NonFiniteError
from amed_engine.sampling.denoiser import mean_of_labels
from amed_engine.serving.conditions import picked
from amed_engine.serving.programs import Programmed
from amed_engine.serving.rows import Rows, Start
from amed_engine.serving.scheduler import Job, Placed

logger = logging.getLogger("amed_engine")


class Sample(NamedTuple):
    """One sample of a request: its place in it, its seed (None for latents given), class number or label vector (None for an
    unconditional model), and the image (C, H, W)."""

    index: int
    seed: int | None
    label: Tensor | None
    image: Tensor


@dataclass(eq=False)
class Order(Job):
    """A job with what its samples start from: seeds, or latents (B, C, ...) of unit variance; classes (B, ...) as they were
    given, None to draw them from the seeds. conditions: of the network, (1 or B, ...) each, in place of classes."""

    programmed: Programmed
    scale: float | None
    seeds: list[int] | None
    latents: Tensor | None
    classes: Tensor | None
    conditions: dict[str, Tensor] | None = None
    on_sample: Callable[[Sample], None] | None = None
    future: Future[SampleResult] = field(default_factory=Future)
    owner: Any = None  # the engine, which lives until this is done
    submitted: float = field(default_factory=time.monotonic)
    buckets: set[int] = field(default_factory=set)

    def __post_init__(self):
        super().__post_init__()
        self.images: list[Tensor | None] = [None] * self.samples
        self.labels: list[Tensor | None] = [None] * self.samples
        self.failed: dict[int, int] = {}  # sample -> the evaluation that was not finite
        self.delivered = 0

    def starts(self, indices: Sequence[int], rows: Rows) -> list[Start]:
        """What these samples begin with, on the device of the rows."""
        program, table, model = self.programmed.program, self.programmed.table, rows.model
        assert table is not None
        latents, classes, noises = self._drawn(indices, rows)
        labels = None if classes is None else model.label_rows(sent(classes, rows.device)).to(rows.dtype)
        chosen = {} if rows.conditions is None else rows.conditions.chosen(self.conditions, indices, labels)
        guided = self.scale is not None and (labels is not None or self.conditions is not None)
        starts = []
        for k, index in enumerate(indices):
            self.labels[index] = None if classes is None else classes[k]
            label = None if labels is None else labels[k]
            mean = None
            if program.mean is not None:
                mean = mean_of_labels(program.mean, None if label is None else label[None], self.scale)[0]
            more = None if noises is None else noises[k]
            own = {name: value[k] for name, value in chosen.items()}
            starts.append(Start(table, latents[k], more, mean, label, float(self.scale) if guided else 1.0, own))  # type: ignore[arg-type]
        return starts

    def _drawn(self, indices: Sequence[int], rows: Rows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        given = None if self.classes is None else picked(self.classes, indices)
        if self.latents is not None:
            return picked(self.latents, indices), given, None
        assert self.seeds is not None
        classes, count = 0 if self.conditions else rows.model.classes, self.programmed.program.noises
        seeds = [self.seeds[index] for index in indices]
        noise, drawn, more = draw_all(seeds, tuple(rows.x.shape[1:]), classes, count)
        send = [sent(tensor, rows.device, rows.dtype) for tensor in (noise, more)]
        return send[0], drawn if given is None else given, send[1] if count else None

    def when_cancelled(self, call: Callable[[Order], None]) -> None:
        """Call a method once the future is cancelled. Nobody may hold a lock that it takes: it may be called at once.

        A future keeps what it calls, and so would keep itself and the engine: it gets weak references.
        """
        own, method = weakref.ref(self), weakref.WeakMethod(call)

        def look(future: Future) -> None:
            order, there = own(), method()
            if future.cancelled() and order is not None and there is not None:
                there(order)

        self.future.add_done_callback(look)

    def place(self, index: int, image: Tensor, finite: int | None) -> bool:
        """One sample more, after so many finite evaluations (None: nobody looked). Whether it was the last."""
        if finite is not None and finite < self.ticks:
            self.failed[index] = finite + 1
        else:
            self.images[index] = image
        self.delivered += 1
        return self.delivered == self.samples

    def tell(self, index: int) -> None:
        """Call `on_sample`; what it raises is the caller's, and ends no thread of the engine."""
        image = self.images[index]
        if self.on_sample is None or image is None or self.future.cancelled():
            return
        try:
            self.on_sample(Sample(index, self.seeds[index] if self.seeds else None, self.labels[index], image))
        except BaseException:
            logger.exception("on_sample failed for sample %d; the request goes on", index)

    def finish(self, result: SampleResult | BaseException) -> None:
        """Fulfil the future, if anybody still waits; once, see `Loop`."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)
        except BaseException:  # Future lets through what is no Exception
            logger.exception("a callback of a request's future failed")

    def result(self, backend: str) -> SampleResult | Exception:
        """All samples, or why there are none."""
        if self.failed:
            return self._non_finite()
        try:
            return self._whole(backend)
        except RuntimeError as error:  # there is no memory for all of them at once
            return error

    def _whole(self, backend: str) -> SampleResult:
        labels = None if self.labels[0] is None else torch.stack(self.labels)  # type: ignore[arg-type]
        images, seconds = torch.stack(self.images), time.monotonic() - self.submitted  # type: ignore[arg-type]
        if images.is_cuda:  # made on a stream aside, used on the caller's
            images.record_stream(torch.cuda.default_stream(images.device))
        plan, buckets = self.programmed.plan, tuple(sorted(self.buckets))
        return SampleResult(images, plan.nfe, self.seeds, labels, backend, plan, 1, seconds, buckets)

    def _non_finite(self) -> NonFiniteError:
        what = "seeds" if self.seeds else "rows"
        named = [self.seeds[index] if self.seeds else index for index in sorted(self.failed)]
        step = min(self.failed.values())
        return NonFiniteError(
            f"samples became NaN or infinite in evaluation {step} of {self.ticks}, {what} {named}; check the model's output "
            "at that noise level, and its precision (bfloat16 or float32 instead of float16)",
            step,
            named,
        )


def starts_of(
    placed: Sequence[Placed], rows: Rows, fail: Callable[[Order, Exception], None]
) -> list[tuple[int, Start]]:
    """What samples begin with, and their rows. An order for which there is no saying is told to `fail`, alone."""
    by_order: dict[Any, list[Placed]] = {}
    for sample in placed:
        by_order.setdefault(sample.job, []).append(sample)
    found: list[tuple[int, Start]] = []
    for order, samples in by_order.items():
        try:
            starts = order.starts([sample.index for sample in samples], rows)
        except Exception as error:
            fail(order, error)
        else:
            found += zip([sample.row for sample in samples], starts, strict=True)
    return found
