"""What is fitted: a predictor with its noise levels as one vector, and where it comes from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.sampling.loop import integrate
from amed_engine.sampling.predictors.coefficient import CoefficientPredictor
from amed_engine.sampling.predictors.constant import ConstantPredictor
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program

Fitted = ConstantPredictor | CoefficientPredictor
NUDGE = 0.01  # of a coefficient, relative to what it is added to
CLOSEST = 1.01  # ratio of neighbouring noise levels at least, wider than a nudge


@dataclass(frozen=True)
class Candidate:
    """A predictor with its noise levels, as a vector theta and back.

    theta holds the predictor's numbers and then log sigma of the inner noise levels, if those are learned.
    """

    plan: Plan
    predictor: Fitted
    learn_sigmas: bool = True

    @property
    def collisions(self) -> set[int]:
        """Which of theta are noise levels that do not keep their distance to a neighbour."""
        sigmas, first = self.plan.sigmas, len(self._numbers()) - 1
        close = [k for k in range(1, len(sigmas)) if not sigmas[k - 1] >= CLOSEST * sigmas[k]]
        inner = range(1, len(sigmas) - 1) if self.learn_sigmas else ()
        return {first + k for pair in close for k in (pair - 1, pair) if k in inner}

    @property
    def free(self) -> list[tuple[int, int]]:
        """(interval, column) of each free coefficient of a CoefficientPredictor."""
        predictor = self.predictor
        if not isinstance(predictor, CoefficientPredictor):
            return []
        return [(i, j) for i in range(predictor.intervals) for j in range(predictor.width(i))]

    def theta(self) -> Tensor:
        inner = self.plan.levels[1:-1].log() if self.learn_sigmas else self.plan.levels[:0]
        return torch.cat([self._numbers(), inner])

    def _numbers(self) -> Tensor:
        predictor = self.predictor
        if isinstance(predictor, CoefficientPredictor):
            return torch.stack([predictor.coefficients.detach()[place] for place in self.free])
        parts = (predictor.r.detach().logit(), predictor.scale_dir.detach(), predictor.scale_time.detach().log())
        return torch.cat([part.flatten() for part in parts])

    def at(self, theta: Tensor) -> Candidate:
        """The candidate of another theta."""
        predictor, count = copy.deepcopy(self.predictor), len(self._numbers())
        with torch.no_grad():
            if isinstance(predictor, CoefficientPredictor):
                for place, value in zip(self.free, theta, strict=False):
                    predictor.coefficients[place] = value
            else:
                r, direction, time = theta[:count].reshape(3, *predictor.r.shape)
                predictor.r.copy_(r.sigmoid())
                predictor.scale_dir.copy_(direction)
                predictor.scale_time.copy_(time.exp())
        return replace(self, plan=self._moved(theta[count:]), predictor=predictor)

    def _moved(self, inner: Tensor) -> Plan:
        return self.plan.through(inner.exp().tolist()) if self.learn_sigmas else self.plan

    def nudges(self) -> Tensor:
        """How far to move each number for a finite difference: small against the noise where it acts."""
        sizes = []
        if isinstance(self.predictor, CoefficientPredictor):
            sizes = [NUDGE * max(self.plan.sigmas[i + 1], 0.1) for i, _ in self.free]
        else:
            sizes = [size for size in (5 * NUDGE, NUDGE, 2 * NUDGE) for _ in range(self.predictor.r.numel())]
        return torch.tensor(sizes + [NUDGE / 2] * (len(self.theta()) - len(sizes)), dtype=torch.float64)

    def starts(self) -> list[int]:
        """The interval from which on each number matters."""
        n = self.plan.intervals
        if isinstance(self.predictor, CoefficientPredictor):
            own, level = [i for i, _ in self.free], range(1, n)
        else:
            own, level = [i for _ in range(3) for i in range(n) for _ in range(self.predictor.points)], range(n - 1)
        return [*own, *(level if self.learn_sigmas else ())]

    def program(self, like: Tensor) -> Program:
        """What the loop runs, on the device and in the precision of a state."""
        predictor = copy.deepcopy(self.predictor).to(like.device)
        return self.plan.program(predictor.choices()).on(like.device, like.dtype)


def unrolled(program: Program) -> tuple[Tensor, list[float]]:
    """Any program without a network in it, as rows over [x_0, D_0, D_1, ...] and the noise levels of its evaluations.

    The loop runs on vectors instead of images: the k-th answer of the denoiser is the k-th unit vector, so every point of
    evaluation, and the end, comes out as its own coefficients. (evaluations [- 1 without an analytic first step], columns).
    """
    if program.updates is None:
        raise ConfigError("only a program of constants can be unrolled; freeze the predictor first")
    basis = torch.eye(program.nfe + 1, dtype=torch.float64)
    points: list[Tensor] = []
    levels: list[float] = []

    def unit(x: Tensor, sigma: Tensor) -> Tensor:
        answers = basis[1 + len(points) : 1 + len(points) + len(x)]
        points.extend(x)
        levels.extend(sigma.tolist())
        return answers

    end = integrate(program.on(torch.device("cpu"), torch.float64), unit, basis[:1])[-1]
    return torch.stack([*points, end[0]]), levels


def nonstationary(program: Program, sigma_min: float) -> Candidate:
    """A program of constants in the most general linear form: the start of a fit."""
    rows, levels = unrolled(program)
    start = float(program.sigmas[0])
    afs = program.afs
    rows = rows if afs else rows[1:]
    predictor = CoefficientPredictor(len(rows), start, afs=afs)
    with torch.no_grad():
        for i, row in enumerate(rows):
            width = predictor.width(i)
            predictor.coefficients[i, 0] = row[0] * start
            predictor.coefficients[i, 1:width] = row[1:width].flip(0)
    sigmas = (start, *(levels if afs else levels[1:]), sigma_min)
    return Candidate(Plan("nonstationary", sigmas, afs=afs, midpoint=True), predictor)
