"""A request on its way: what it asked for, which of its samples are done, and the future that waits for them."""

from __future__ import annotations

import logging
import threading
import time
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
    submitted: float = field(default_factory=time.monotonic)
    buckets: set[int] = field(default_factory=set)

    def __post_init__(self):
        super().__post_init__()
        self.images: list[Tensor | None] = [None] * self.samples
        self.labels: list[Tensor | None] = [None] * self.samples
        self.failed: dict[int, int] = {}  # sample -> the evaluation that was not finite
        self.delivered = 0
        self._settled, self._lock = False, threading.Lock()

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

    def keep(self, index: int, image: Tensor, finite: int | None) -> bool:
        """One sample more, after so many finite evaluations (None: nobody looked). Whether it is one."""
        self.delivered += 1
        if finite is not None and finite < self.ticks:
            self.failed[index] = finite + 1
            return False
        self.images[index] = image
        return True

    def tell(self, index: int) -> None:
        """on_sample, of a sample that was kept."""
        image = self.images[index]
        if self.on_sample is None or image is None or self.future.done():
            return
        try:
            self.on_sample(Sample(index, self.seeds[index] if self.seeds else None, self.labels[index], image))
        except Exception:
            logger.exception("on_sample failed for sample %d; the request goes on", index)

    def finish(self, result: SampleResult | NonFiniteError) -> None:
        """Fulfil the future, if anybody still waits."""
        if isinstance(result, NonFiniteError):
            self.fail(result)
        elif self.settles():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        if self.settles():
            self.future.set_exception(error)

    def settles(self) -> bool:
        """Whether it is for the caller to set the future: for the first thread that comes to it, unless it was cancelled, of
        which whoever waits is told."""
        with self._lock:
            first, self._settled = not self._settled, True
        return first and self.future.set_running_or_notify_cancel()

    def result(self, backend: str) -> SampleResult | NonFiniteError:
        """All samples, or which of them failed."""
        if self.failed:
            return self._non_finite()
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


def starts_of(placed: Sequence[Placed], rows: Rows) -> list[tuple[int, Start]]:
    """What samples of any orders begin with, each with its row."""
    by_order: dict[Any, list[Placed]] = {}
    for sample in placed:
        by_order.setdefault(sample.job, []).append(sample)
    return [
        (sample.row, start)
        for order, samples in by_order.items()
        for sample, start in zip(samples, order.starts([s.index for s in samples], rows), strict=True)
    ]
