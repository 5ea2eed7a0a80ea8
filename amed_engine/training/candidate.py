"""What is fitted: a predictor with its noise levels as one vector, and where it comes from."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised
from amed_engine.sampling.loop import integrate
from amed_engine.sampling.modes import plain_defaults
from amed_engine.sampling.predictors.coefficient import CoefficientPredictor
from amed_engine.sampling.predictors.constant import ConstantPredictor
from amed_engine.solvers.mean import Mean
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program

Fitted = ConstantPredictor | CoefficientPredictor
NUDGE = 0.01  # of a coefficient, relative to what it is added to
CLOSEST = 1.01  # ratio of neighbouring noise levels at least, wider than a nudge


class Probe(NamedTuple):
    """How one number is differentiated: how far it moves, small against the noise where it acts, and the interval from
    which on it matters. again: it changes what that interval evaluates first."""

    nudge: float
    start: int
    again: bool = False


@dataclass(frozen=True)
class Candidate(ABC):
    """A predictor with its noise levels, as a vector theta and back.

    theta holds the predictor's numbers, then log sigma of the inner noise levels, if those are learned, then per-sample
    offsets, if there are any.
    """

    plan: Plan
    predictor: Fitted
    learn_sigmas: bool = True

    @abstractmethod
    def _numbers(self) -> Tensor:
        """Of the predictor, (numbers,) float64, none of them bounded."""

    @abstractmethod
    def _write(self, numbers: Tensor, offsets: Tensor) -> None:
        """Make these the predictor's, in place."""

    @abstractmethod
    def probes(self) -> list[Probe]:
        """Of every number of theta but the offsets."""

    def _offsets(self) -> Tensor:
        return self.plan.levels[:0]

    def expanded(self, columns: Tensor, evaluations: Sequence[Denoised]) -> Tensor:
        """The Jacobian (B, n, probes), with the columns of the offsets; evaluations: the first one of every interval."""
        return columns

    def prior(self, diagonal: Tensor) -> Tensor:
        """How strongly each number of theta is drawn to zero, given the diagonal of JᵀJ; both (theta,)."""
        return torch.zeros_like(diagonal)

    @property
    def collisions(self) -> set[int]:
        """Which of theta are noise levels that do not keep their distance to a neighbour."""
        sigmas, first = self.plan.sigmas, len(self._numbers()) - 1
        close = [k for k in range(1, len(sigmas)) if not sigmas[k - 1] >= CLOSEST * sigmas[k]]
        return {first + k for pair in close for k in (pair - 1, pair) if k in self._inner()}

    def theta(self) -> Tensor:
        return torch.cat([self._numbers(), self.plan.levels[list(self._inner())].log(), self._offsets()])

    def _inner(self) -> range:
        """Which noise levels are learned."""
        return range(1, self.plan.intervals if self.learn_sigmas else 1)

    def at(self, theta: Tensor) -> Self:
        """The candidate of another theta."""
        own, inner = len(self._numbers()), len(self._inner())
        numbers, levels, offsets = theta.tensor_split([own, own + inner])
        plan = self.plan.through(levels.exp().tolist()) if self.learn_sigmas else self.plan
        moved = replace(self, plan=plan, predictor=copy.deepcopy(self.predictor))
        with torch.no_grad():
            moved._write(numbers, offsets)
        return moved

    def _level_probes(self, first: int, again: bool = False) -> list[Probe]:
        """Of the noise levels, the first of which matters from the interval `first` on."""
        return [Probe(NUDGE / 2, first + k, again) for k in range(len(self._inner()))]

    def program(self, like: Tensor) -> Program:
        """What the loop runs, on the device and in the precision of a state."""
        predictor = copy.deepcopy(self.predictor).to(like.device)
        return self.plan.program(predictor.choices()).on(like.device, like.dtype)


class Constants(Candidate):
    """logit r, scale_dir and log scale_time of every interval and point."""

    predictor: ConstantPredictor

    def _numbers(self) -> Tensor:
        predictor = self.predictor
        parts = (predictor.r.detach().logit(), predictor.scale_dir.detach(), predictor.scale_time.detach().log())
        return torch.cat([part.flatten() for part in parts])

    def _write(self, numbers: Tensor, offsets: Tensor) -> None:
        r, direction, time = numbers.reshape(3, *self.predictor.r.shape)
        self.predictor.r.copy_(r.sigmoid())
        self.predictor.scale_dir.copy_(direction)
        self.predictor.scale_time.copy_(time.exp())

    def probes(self) -> list[Probe]:
        places = [i for i in range(self.plan.intervals) for _ in range(self.predictor.points)]
        own = [Probe(nudge, i) for nudge in (5 * NUDGE, NUDGE, 2 * NUDGE) for i in places]
        return [*own, *self._level_probes(0)]


class Coefficients(Candidate):
    """The free coefficients of every row, and the heads of their offsets, where the predictor has any."""

    predictor: CoefficientPredictor

    @property
    def free(self) -> list[tuple[int, int]]:
        """(interval, column) of each free coefficient."""
        predictor = self.predictor
        return [(i, j) for i in range(predictor.intervals) for j in range(predictor.width(i))]

    def _numbers(self) -> Tensor:
        return torch.stack([self.predictor.coefficients.detach()[place] for place in self.free])

    def _offsets(self) -> Tensor:
        heads = self.predictor.heads
        return super()._offsets() if heads is None else torch.cat([heads.detach()[place] for place in self.free])

    def _write(self, numbers: Tensor, offsets: Tensor) -> None:
        coefficients, heads = self.predictor.coefficients, self.predictor.heads
        rows = offsets.reshape(len(numbers), self.predictor.codes)
        for place, number, row in zip(self.free, numbers, rows, strict=True):
            coefficients[place] = number
            if heads is not None:
                heads[place] = row

    def probes(self) -> list[Probe]:
        own = [Probe(NUDGE * max(self.plan.sigmas[i + 1], 0.1), i) for i, _ in self.free]
        # Free rows leave the points where they are: a noise level changes what the network is told there.
        return [*own, *self._level_probes(1, again=True)]

    def expanded(self, columns: Tensor, evaluations: Sequence[Denoised]) -> Tensor:
        """An offset w·phi of a coefficient acts like the coefficient, times phi."""
        predictor = copy.deepcopy(self.predictor).to(columns.device)
        codes = [predictor.code(evaluation.features, i) for i, evaluation in enumerate(evaluations)]
        blank = columns.new_zeros(len(columns), predictor.codes)
        phi = [blank if (code := codes[i]) is None else code for i, _ in self.free]
        heads = columns[:, :, : len(phi), None] * torch.stack(phi, dim=1)[:, None]  # (B, n, free, codes)
        return torch.cat([columns, heads.flatten(2)], dim=2)

    def prior(self, diagonal: Tensor) -> Tensor:
        prior, free = torch.zeros_like(diagonal), len(self.free)
        prior[len(self.probes()) :] = diagonal[:free].repeat_interleave(self.predictor.codes)
        return prior


def unrolled(program: Program) -> tuple[Tensor, list[float]]:
    """Any program without a network in it, as rows over [x_0, D_0, D_1, ...] and the noise levels of its evaluations.

    The loop runs on vectors instead of images: the k-th answer of the denoiser is the k-th unit vector, so every point of
    evaluation, and the end, comes out as its own coefficients. (evaluations [- 1 without a first step about zero], columns).
    """
    if program.updates is None:
        raise ConfigError("only a program of constants can be unrolled; freeze the predictor first")
    basis = torch.eye(program.nfe + 1 + int(program.afs == "mean"), dtype=torch.float64, device="cpu")
    points: list[Tensor] = []
    levels: list[float] = []

    def unit(x: Tensor, sigma: Tensor) -> Tensor:
        answers = basis[1 + len(points) : 1 + len(points) + len(x)]
        points.extend(x)
        levels.extend(sigma.tolist())
        return answers

    # A mean answer is no multiple of x_0: what the first step makes of it is a vector of its own, like an evaluation's.
    own = replace(program, afs=False, mean=None) if program.afs == "mean" else program
    end = integrate(own.on(torch.device("cpu"), torch.float64), unit, basis[:1])[-1]
    return torch.stack([*points, end[0]]), levels


def nonstationary(program: Program, sigma_min: float, mean: Mean | None = None) -> Coefficients:
    """A program of constants in the most general linear form: the start of a fit. mean: what its first step "mean" is about."""
    rows, levels = unrolled(program)
    start, about_zero = float(program.sigmas[0]), program.afs is True
    if not about_zero:  # the first evaluation is at x_0 itself
        rows, levels = rows[1:], levels[1:]
    with plain_defaults():
        predictor = CoefficientPredictor(len(rows), start, afs=about_zero)
    with torch.no_grad():
        for i, row in enumerate(rows):
            width = predictor.width(i)
            predictor.coefficients[i, 0] = row[0] * start
            predictor.coefficients[i, 1:width] = row[1:width].flip(0)
    own: dict[str, Any] = {"afs": program.afs, "mean": mean, "midpoint": True}
    return Coefficients(Plan("nonstationary", (start, *levels, sigma_min), **own), predictor)
