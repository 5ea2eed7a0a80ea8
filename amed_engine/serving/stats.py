"""What an engine did so far, and how long its ticks take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

RECENT = 0.1  # the share of the newest tick in a bucket's mean
AHEAD = 1  # ticks that a GPU may have waiting, so that it never waits for the host, nor a new request for many


@dataclass(frozen=True)
class ServingStats:
    """Counts since the start, but for the gauges rows (there are), live (rows taken) and waiting (samples).

    ticks; evaluations of samples, and evaluated: rows computed for them, padding and guidance's halves included. Of samples:
    admitted, completed, failed, cancelled, refused (the queue was full, or a deadline out of reach), missed (deadlines), beside
    (drawn by `Sampler.run`'s loop, as programs that are no tables are). captures of ticks. tick_seconds in all;
    network_seconds of it, of the host: on a GPU it does not wait. bucket_seconds: recent mean of a tick by size.
    """

    rows: int = 0
    live: int = 0
    waiting: int = 0
    ticks: int = 0
    evaluations: int = 0
    evaluated: int = 0
    admitted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    missed: int = 0
    beside: int = 0
    captures: int = 0
    tick_seconds: float = 0.0
    network_seconds: float = 0.0
    bucket_seconds: dict[int, float] = field(default_factory=dict)


class Pace:
    """How long ticks take. On a GPU events say so, and the host is held back to AHEAD ticks before the device."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.seconds = 0.0
        self.by_bucket: dict[int, float] = {}
        self._started: Any = None
        self._running: deque[tuple[int, Any, Any]] = deque()
        self._side = torch.cuda.Stream(device) if self.on_gpu else None

    def start(self) -> None:
        self._started = self._mark()

    def end(self, size: int) -> Any:
        """The mark after which the tick is done; None where it is done already."""
        mark = self._mark()
        if not self.on_gpu:
            self._note(size, mark - self._started)
            return None
        self._running.append((size, self._started, mark))
        while len(self._running) > AHEAD:
            past, begun, ended = self._running.popleft()
            ended.synchronize()
            self._note(past, begun.elapsed_time(ended) / 1000)
        return mark

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work on samples that are done, which does not wait for the ticks before it on the device."""
        if self._side is None:
            yield
            return
        with torch.cuda.stream(self._side):
            yield
        self._side.synchronize()

    def of(self, size: int) -> float | None:
        """Seconds of a tick of so many rows: of that size or the next larger that was measured, else of the largest."""
        measured = dict(self.by_bucket)
        larger = [each for each in measured if each >= size]
        return measured[min(larger) if larger else max(measured)] if measured else None

    def _note(self, size: int, seconds: float) -> None:
        self.seconds += seconds
        before = self.by_bucket.get(size)
        self.by_bucket[size] = seconds if before is None else before + RECENT * (seconds - before)

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
