"""How a tick runs: by a captured graph for each kind of it, or eagerly."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from amed_engine.adapters.signature import UNBOUNDED
from amed_engine.engine.capture import Addresses, Device, Recording, StaleGraphError, numerics
from amed_engine.engine.graphs import WARMUPS, WARMUPS_TORCHSCRIPT, Bucket, WarmupReport, check_sizes
from amed_engine.errors import AmedError, ConfigError
from amed_engine.sampling.modes import modes_kept
from amed_engine.sampling.modules import said
from amed_engine.sampling.predictors import AMEDPredictor
from amed_engine.serving.rows import Kind, Rows


def check_buckets(buckets: Sequence[int] | None, rows: int, captures: bool) -> list[int] | None:
    """The sizes of ticks, smallest first; None for every number of rows. Raises ConfigError.

    Where nothing is said, graphs have powers of two, and eager ticks just the rows that are live.
    """
    if buckets is None:
        return [1 << k for k in range(rows.bit_length()) if 1 << k < rows] + [rows] if captures else None
    try:
        return check_sizes(buckets)[::-1]
    except ConfigError as error:
        raise ConfigError(f"buckets must be positive integers, e.g. (1, 4, 16), got {buckets!r}") from error


def check_batches(network: Any, sizes: list[int] | None, rows: int) -> int:
    """The largest batch that a network takes, compiled ones few. Raises ConfigError where it takes no tick of some size."""
    low, high = said(network, "batch_range", (1, UNBOUNDED))
    first, last = (sizes[0], sizes[-1]) if sizes else (1, rows)
    if first < low or last > high:
        remedy = f"rows={high}" if low == 1 else f"rows={high} and buckets=({high},)"
        raise ConfigError(
            f"the model was compiled for batches of {low} to {high}, and ticks would have {first} to {last} rows; pass {remedy}"
        )
    return high


@dataclass
class Ticker:
    """Runs ticks of `rows`. device: where they are captured, None for nowhere. buckets: see `check_buckets`."""

    rows: Rows
    buckets: list[int] | None
    device: Device | None = None
    captures: int = 0
    _graphs: dict[Kind, Recording] = field(default_factory=dict)
    _addresses: Addresses | None = None
    _numerics: tuple = ()

    def __post_init__(self):
        module = self.rows.model.module
        self._parts = [] if module is None else list(module.modules())  # walking them takes longer than a small tick

    def kind(self, live: int, guided: int, learned: bool) -> Kind:
        """The tick for so many live rows, of which so many are guided."""
        size = live if self.buckets is None else self.buckets[bisect_left(self.buckets, live)]
        # Of graphs, and where halves are a call of their own, there is one with all of them.
        whole = self.rows.apart or self.buckets is not None
        halves = size * bool(guided) if whole else guided
        return Kind(size, halves, learned)

    def tick(self, kind: Kind) -> None:
        with self._evaluating(), torch.no_grad():
            if self.device is None:
                self.rows.tick(kind)
            else:
                self._replay(self.device, kind)
        self.rows.ticked()

    def warmup(self, guided: bool, learned: AMEDPredictor | None = None) -> WarmupReport:
        """Capture the tick of every bucket, largest first, with guidance's halves too where that is asked for, and with a
        predictor among the rows where one like `learned` is known to come."""
        if self.device is None or self.buckets is None:
            return WarmupReport("eager")
        if learned is not None:
            self.rows.bank.learn(learned)
        halves, with_predictor = (range(1 + asked) for asked in (guided, learned is not None))
        sizes = reversed(self.buckets)
        kinds = [Kind(n, n * both, bool(among)) for n, both, among in product(sizes, halves, with_predictor)]
        with self._evaluating(), torch.no_grad():
            return WarmupReport("graph", tuple(self._capture(self.device, k) for k in kinds if k not in self._graphs))

    def clear(self) -> None:
        """Drop every graph; the next ticks are captured anew, with the weights where they are then."""
        self._addresses = None
        if self.device is not None and self._graphs:
            recordings = list(self._graphs.values())
            self.device.wait()
            self._graphs.clear()
            self.device.drop(recordings)

    def _evaluating(self) -> AbstractContextManager[None]:
        """As `evaluating`."""
        trains = any(getattr(part, "training", False) for part in self._parts)
        return modes_kept(self.rows.model.module) if trains else nullcontext()

    def _replay(self, device: Device, kind: Kind) -> None:
        module = self.rows.model.module
        if self._graphs and self._numerics != numerics(module):
            self.clear()  # what the graphs were captured under is another precision now
        if kind not in self._graphs:
            self._capture(device, kind)
        self._check_weights()
        device.begin_use()
        try:
            self._graphs[kind].replay()
        finally:
            device.end_use()

    def _check_weights(self) -> None:
        """Raises StaleGraphError for what is live, which began with other weights; what comes is captured with those of now."""
        assert self._addresses is not None
        try:
            self._addresses.check()
        except StaleGraphError as error:
            self.clear()
            what = str(error).partition(";")[0]
            raise StaleGraphError(f"{what}; what ran is lost, send it again, or change weights in place") from error

    def _capture(self, device: Device, kind: Kind) -> Bucket:
        """Captured with the rows as they are, which are put back."""
        rows, module = self.rows, self.rows.model.module
        started, before = time.perf_counter(), device.reserved_bytes()
        copies = rows.snapshot()
        device.begin_use()
        try:
            for _ in range(WARMUPS_TORCHSCRIPT if isinstance(module, torch.jit.ScriptModule) else WARMUPS):
                rows.restore(copies)
                expected = device.side_stream(lambda: rows.tick(kind)).clone()
            rows.restore(copies)
            recording, output = device.record(lambda: rows.tick(kind))
            rows.restore(copies)
            recording.replay()
            bitwise = torch.equal(output, expected)
            if not bitwise and not torch.allclose(output, expected, rtol=1e-2, atol=1e-2, equal_nan=True):
                raise AmedError(
                    f"the captured tick of {kind.size} rows does not reproduce the eager one; use backend='eager'"
                )
        finally:
            rows.restore(copies)
            device.end_use()
        self.captures += 1
        self._graphs[kind] = recording
        self._addresses, self._numerics = self._addresses or Addresses(module), numerics(module)
        return Bucket(kind.size, time.perf_counter() - started, device.reserved_bytes() - before, bitwise)
