"""The rows on a device: what each is at, and the tick that takes all of them one evaluation further.

Everything that differs between rows (program, line, guidance, labels) is data on the device, so one captured graph a bucket
serves every request, and the host never waits for the device to know what comes next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from amed_engine.engine.model import Model
from amed_engine.engine.request import sent
from amed_engine.kernels import combine
from amed_engine.sampling.denoiser import Denoised, as_denoised
from amed_engine.serving.bank import IDLE, Bank
from amed_engine.serving.conditions import conditions_of
from amed_engine.serving.table import Table

Told = dict[str, Tensor]  # conditions by name, or labels by this one
LABELS = "class labels"


@dataclass(frozen=True)
class Start:
    """A sample on its way into a row: latents (C, H, W) of unit variance, noises (K, C, H, W), the mean answer it starts about
    (C, H, W) or None, label row (label_dim,) or None; all on the device. scale: guidance, 1 for none. conditions: of the
    network, a row each."""

    table: Table
    latents: Tensor
    noises: Tensor | None
    mean: Tensor | None
    label: Tensor | None
    scale: float
    conditions: dict[str, Tensor] = field(default_factory=dict)


class Kind(NamedTuple):
    """Which tick runs. size: rows. halves: how many of them are evaluated without their label too. learned: whether a
    predictor is among them."""

    size: int
    halves: int = 0
    learned: bool = False


class Rows:
    """`count` rows of samples of one shape. apart: guidance's halves are calls of their own, so that a row's numbers depend on
    the size of its bucket alone, or since the network takes no larger batch."""

    def __init__(
        self,
        model: Model,
        count: int,
        shape: tuple[int, ...],
        history: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        apart: bool,
    ):
        def zeros(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*sizes, device=device, dtype=dtype)

        self.model, self.count, self.history, self.apart = model, count, history, apart
        self.device, self.dtype = device, dtype
        self.bank = Bank(2 * count + 64, history, device, dtype)
        self.x, self.y, self.direction = zeros(count, *shape), zeros(count, *shape), zeros(count, *shape)
        # The buffer of age k at tick p is (p - k) mod H, the same for all rows, so nothing is shifted.
        self.ring = zeros(history, count, *shape)
        self.phase = zeros(1, dtype=torch.int64)
        self.ages = torch.arange(1, history + 1, device=device)
        self.line = torch.full((count,), IDLE, device=device, dtype=torch.int64)
        self.finite = zeros(count, dtype=torch.int64)  # evaluations after which it was, since the row was written
        self.scale = torch.ones(count, device=device, dtype=dtype)
        self.halved = torch.arange(count, device=device)  # the rows that guidance halves, where those are not all
        self.conditions = conditions_of(model, count, device, dtype)
        # Of labels that choose conditions, a row has what they chose.
        self.labels = zeros(count, model.label_dim) if model.label_dim and self.conditions is None else None
        self.mid = torch.ones(count, 4, device=device, dtype=torch.float64)  # m, scale_dir, r, level told
        self.network_seconds = 0.0  # of the host; on a GPU it does not wait
        self._ticks = 0
        self._tables: list[Table | None] = [None] * count

    # ---- what happens between ticks ----

    @torch.no_grad()
    def write(self, starts: Sequence[tuple[int, Start]]) -> None:
        """Samples into free rows, all of whose former state is overwritten."""
        rows = self._index([row for row, _ in starts])
        given = [start for _, start in starts]
        tables = [start.table for start in given]
        lines = [self._take(row, start.table) for row, start in starts]
        state = self._spread(torch.stack([table.start for table in tables])) * torch.stack(
            [start.latents for start in given]
        ).unsqueeze(1)
        for k, start in enumerate(given):
            if start.mean is not None:
                state[k] += self._spread(start.table.shift[None])[0] * start.mean
            if start.noises is not None:
                state[k, 2 : 2 + start.table.noises] += start.noises.flip(0)
        self.x.index_copy_(0, rows, state[:, 0])
        self.y.index_copy_(0, rows, state[:, 1])
        # Buffer b holds age (p - b) mod H, of which 0 is H.
        ages = [1 + (self._ticks - buffer - 1) % self.history for buffer in range(self.history)]
        self.ring.index_copy_(1, rows, state.index_select(1, self._index([1 + age for age in ages])).transpose(0, 1))
        self.line.index_copy_(0, rows, self._index(lines))
        self.finite.index_fill_(0, rows, 0)
        self.mid.index_fill_(0, rows, 1.0)
        scales = torch.tensor([start.scale for start in given], dtype=self.dtype, device="cpu")
        self.scale.index_copy_(0, rows, sent(scales, self.device))
        if self.conditions is not None:
            self.conditions.write(rows, [start.conditions for start in given])
        if self.labels is not None:
            labels = [start.label for start in given]
            self.labels.index_copy_(0, rows, torch.stack(labels))  # type: ignore[arg-type]

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Rows (from, to), whose state is copied."""
        old, new = (self._index(rows) for rows in zip(*moves, strict=True))
        for state in (self.x, self.y, self.line, self.finite, self.scale, self.labels, self.mid):
            if state is not None:
                state.index_copy_(0, new, state.index_select(0, old))
        self.ring.index_copy_(1, new, self.ring.index_select(1, old))
        if self.conditions is not None:
            self.conditions.move(old, new)
        for source, target in moves:
            self.free([target])
            self._tables[target], self._tables[source] = self._tables[source], None
        self.line.index_fill_(0, old, IDLE)

    def park(self, rows: Sequence[int]) -> None:
        """Rows whose samples nobody wants any more: their programs end here."""
        self.free(rows)
        self.line.index_fill_(0, self._index(rows), IDLE)

    def free(self, rows: Sequence[int]) -> None:
        """Rows that nobody has any more; they stay as they are until they are written."""
        for row in rows:
            table, self._tables[row] = self._tables[row], None
            if table is not None:
                self.bank.release(table)

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Their samples (n, C, H, W), and how many evaluations were finite (n,), on the host when the device is there."""
        index = self._index(rows)
        finite = self.finite.index_select(0, index)
        if finite.is_cuda:
            finite = torch.empty(len(rows), dtype=finite.dtype, pin_memory=True).copy_(finite, non_blocking=True)
        return self.y.index_select(0, index), finite

    def halve(self, rows: Sequence[int]) -> None:
        """Which rows guidance halves, for ticks of that many halves."""
        self.halved[: len(rows)] = self._index(rows)

    def ticked(self) -> None:
        """The host's count of ticks, which are replayed without it."""
        self._ticks += 1

    def _take(self, row: int, table: Table) -> int:
        self.free([row])
        self._tables[row] = table
        return self.bank.hold(table)

    def _index(self, rows: Sequence[int]) -> Tensor:
        return sent(torch.tensor(rows, dtype=torch.int64, device="cpu"), self.device)

    def _spread(self, numbers: Tensor) -> Tensor:
        """(n, 2 + H) numbers of the host to multiply states with."""
        on_device = sent(numbers.to(self.dtype), self.device)
        return on_device.reshape(*numbers.shape, *[1] * (self.x.dim() - 1))

    # ---- the tick ----

    @torch.no_grad()
    def tick(self, kind: Kind) -> Tensor:
        """One evaluation of the first `kind.size` rows; their points of evaluation. What is captured."""
        size = kind.size
        x, y, line, mid = self.x[:size], self.y[:size], self.line[:size], self.mid[:size]
        sigma = self.bank.sigma.index_select(0, line)
        if kind.learned:
            sigma = torch.where(sigma > 0, sigma, mid[:, 3].to(sigma.dtype))
        answer = self._denoised(y, sigma, kind)
        ring = self.ring[:, :size]
        past = ring.index_select(0, (self.phase - self.ages) % self.history)  # by age, so that sums have one order
        combine([x, y, answer.x0, *past.unbind(0)], self._matrix(answer, kind), out=[self.direction[:size], x, y])
        self.finite[:size] += (
            y.isfinite().reshape(size, -1).all(1)
        )  # of the answer, which y reads in any case, and of the sum
        ring.index_copy_(0, self.phase % self.history, self.direction[:size].unsqueeze(0))
        self.phase += 1
        line.copy_(self.bank.follows.index_select(0, line))
        return y

    def _matrix(self, answer: Denoised, kind: Kind) -> Tensor:
        """(3, 3 + H, S)."""
        line = self.line[: kind.size]
        if kind.learned:
            learned, mid = self.bank.learned, self.mid[: kind.size]
            assert learned is not None
            mid.copy_(learned.choose(line, answer.features, mid))
            coefficients = learned.coefficients(line, mid).to(self.dtype)
        else:
            coefficients = self.bank.coefficients.index_select(0, line)
        return coefficients.t().reshape(3, 3 + self.history, kind.size).contiguous()

    def _denoised(self, y: Tensor, sigma: Tensor, kind: Kind) -> Denoised:
        """D, where a row is guided D_u + g (D_c - D_u); features of the conditional half."""
        started = time.perf_counter()
        size, told, none = kind.size, *self._told(kind.size)
        if not kind.halves:
            answer = self._ask(y, sigma, told)
        elif self.apart:
            answer = self._guided(self._ask(y, sigma, told), self._ask(y, sigma, none).x0)
        elif kind.halves == size:
            both = self._ask(torch.cat([y, y]), torch.cat([sigma, sigma]), _joined(told, none))
            answer = self._guided(_first(both, size), both.x0[size:])
        else:
            answer = self._few(y, sigma, told, none, self.halved[: kind.halves])
        self.network_seconds += time.perf_counter() - started
        return answer

    def _told(self, size: int) -> tuple[Told, Told]:
        """What the network is told of the first rows beside their noise levels, and what means "none" in its place."""
        if self.conditions is not None:
            return self.conditions.first(size), self.conditions.none(size)
        if self.labels is None:
            return {}, {}
        return {LABELS: self.labels[:size]}, {LABELS: torch.zeros_like(self.labels[:size])}

    def _few(self, y: Tensor, sigma: Tensor, told: Told, none: Told, few: Tensor) -> Denoised:
        """The halves of a few rows behind all rows, in one call."""
        size, count = len(y), len(few)
        states, levels = (torch.cat([tensor, tensor.index_select(0, few)]) for tensor in (y, sigma))
        both = self._ask(states, levels, _joined(told, {name: value[:count] for name, value in none.items()}))
        answer, free = _first(both, size), both.x0[size:]
        scale = self.scale.index_select(0, few).reshape(-1, *[1] * (y.dim() - 1))
        guided = free + scale * (answer.x0.index_select(0, few) - free)
        return answer._replace(x0=answer.x0.index_copy(0, few, guided))

    def _guided(self, answer: Denoised, free: Tensor) -> Denoised:
        scale = self.scale[: len(free)].reshape(-1, *[1] * (free.dim() - 1))
        guided = free + scale * (answer.x0 - free)
        return answer._replace(x0=torch.where(scale == 1, answer.x0, guided))

    def _ask(self, y: Tensor, sigma: Tensor, told: Told) -> Denoised:
        conditions = {name: value for name, value in told.items() if name != LABELS}
        labels = (told[LABELS],) if LABELS in told else ()
        return as_denoised(self.model.denoise(y, sigma, *labels, **conditions))

    def snapshot(self) -> list[Tensor]:
        """Copies of all that a tick writes."""
        return [state.clone() for state in self._state]

    def restore(self, copies: Sequence[Tensor]) -> None:
        for state, copy in zip(self._state, copies, strict=True):
            state.copy_(copy)

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return self.x, self.y, self.ring, self.phase, self.line, self.finite, self.mid


def _joined(told: Told, none: Told) -> Told:
    return {name: torch.cat([value, none[name]]) for name, value in told.items()}


def _first(answer: Denoised, size: int) -> Denoised:
    """The answer to the first rows; features that have other rows than the batch stay as they are, and are refused."""
    features = answer.features
    if features is not None and features.dim() and features.shape[0] == answer.x0.shape[0]:
        features = features[:size]
    return Denoised(answer.x0[:size], features)
