"""A program as a table of numbers, so that rows of any programs share one evaluation. No image or network in sight.

A row's state is (x, y, a_1 .. a_H): anchor, evaluation point, directions by their age in ticks. One evaluation
D = denoiser(y; sigma[t]) takes it to

    [a_0, x', y'] = C[t] [x, y, D, a_1 .. a_H],    t = 0 .. T - 1

and the last y is the sample. a_0 is the new direction (D itself where a program keeps that, or none), a_1 at the next tick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amed_engine.engine.export.tableau import BASIS, Coefficient, Evaluation, basis_at
from amed_engine.engine.export.write_plan import evaluations
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import analytic_first_step
from amed_engine.sampling.predictors import AMEDPredictor
from amed_engine.solvers.program import Program
from amed_engine.solvers.rules import midpoint_level

MAX_TICKS = 64  # evaluations of a program in a table
MAX_HISTORY = 13  # `combine` reads x, y, D and as many directions
SIZES = {"hidden_dim": 128, "bottleneck_dim": 4, "embedding_dim": 8}  # of the predictors that tables have room for
X, Y, D = 0, 1, 2  # columns; direction a_k is column 2 + k


class NoTable(ConfigError):
    """A program that is no table of this size; it is right, and runs by itself."""


@dataclass(frozen=True, eq=False)
class Table:
    """T evaluations of a program that starts from latents z of unit variance, with H ages of directions; float64 on the host.

    start, shift: (2 + H,), x, y, a_1 .. a_H are start·z + shift·mean, mean being the sample's mean answer where the program
    starts about one. noises: how many fresh noises the sample brings, added to a_noises .. a_1 in this order.
    coefficients: (T, 3, 3 + H, 8), weights on `BASIS` of the predictor's midpoint; (T, 3, 3 + H) without predictor.
    sigma: (T,) noise level told to the network, 0 for scale_time·m. interval: (T, 2), the noise levels between which the
    predictor chooses from this evaluation's features; 0 where it does not.
    """

    start: Tensor
    shift: Tensor
    noises: int
    coefficients: Tensor
    sigma: Tensor
    interval: Tensor
    predictor: AMEDPredictor | None = field(default=None, repr=False)

    @property
    def ticks(self) -> int:
        return len(self.sigma)


def tabulated(program: Program, history: int) -> Table:
    """The table of a program (float64 on the host, its predictor where it is) with `history` ages.

    Raises NoTable for several points at once, thresholding, coefficients that are no combination of `BASIS`, directions that
    are older, or more than MAX_TICKS evaluations.
    """
    _check(program)
    try:
        steps = list(evaluations(program))
    except ConfigError as error:  # of another predictor than AMED's, or a solver without a table under one
        raise NoTable(str(error)) from error
    writer = _Writer(program, history)
    for step in steps:
        writer.add(step)
    return writer.table()


def _check(program: Program) -> None:
    if program.solver.thresholds:
        raise NoTable("thresholding looks at a whole sample, and is no table")
    if program.nfe > MAX_TICKS:
        raise NoTable(f"{program.nfe} evaluations are more than the {MAX_TICKS} of a table")
    if isinstance(program.predictor, Sequence) and any(callable(choice) for choice in program.predictor):
        raise NoTable("coefficients that depend on the sample otherwise than by a midpoint are no table")
    if isinstance(program.predictor, AMEDPredictor) and program.predictor.config | SIZES != program.predictor.config:
        raise NoTable(f"predictors of other sizes than {SIZES} have no room in a table")


class _Writer:
    """Walks through the evaluations of a program; what comes before the network's first is applied to the start at once."""

    def __init__(self, program: Program, history: int):
        self.program, self.history = program, history
        self.learned = program.updates is None
        count = program.noises
        if count > history:
            raise NoTable(f"{count} fresh noises are more than the {history} directions of a table")
        # Of z and of the mean answer, for x, y and each direction, newest first.
        sigma = float(program.sigmas[0])
        self.x = self.y = (sigma, 0.0)
        self.past: list[tuple[float, float]] = [(0.0, 0.0)] * count
        self.born = [-k for k in range(1, count + 1)]  # at which tick each direction came to be, newest first
        self.y_is_x = True
        self.mid: tuple[float, float, float] | None = None  # m, r, scale_dir where they are known beforehand
        self.told = 0.0
        self.matrices: list[Tensor] = []
        self.sigmas: list[float] = []
        self.intervals: list[tuple[float, float]] = []

    def add(self, step: Evaluation) -> None:
        if step.points != 1 or step.next_points != 1:
            raise NoTable("several evaluation points at once are several rows, and no table")
        if step.analytic:
            self._start(step)
        else:
            self._tick(step)
        self.y_is_x = step.x_is_y

    def table(self) -> Table:
        zeros = [(0.0, 0.0)] * (self.history - len(self.past))
        start = torch.tensor([self.x, self.y, *self.past, *zeros], dtype=torch.float64, device="cpu")
        coefficients = torch.stack(self.matrices)
        return Table(
            start=start[:, 0],
            shift=start[:, 1],
            noises=self.program.noises,
            coefficients=coefficients if self.learned else coefficients[..., 0],
            sigma=torch.tensor(self.sigmas, dtype=torch.float64, device="cpu"),
            interval=torch.tensor(self.intervals, dtype=torch.float64, device="cpu"),
            predictor=self.program.predictor if self.learned else None,  # type: ignore[arg-type]
        )

    # ---- before the first tick ----

    def _start(self, step: Evaluation) -> None:
        """The analytic first step, which is linear in z and the mean: taken of their shares, as of a sample."""
        assert step.sigma is not None
        y, sigma = (torch.tensor([each], dtype=torch.float64, device="cpu") for each in (self.y, step.sigma[0]))
        mean = None if self.program.mean is None else y.new_tensor([[0.0, 1.0]])
        of_z, of_mean = analytic_first_step(y, sigma, mean).x0[0].tolist()
        answer = (of_z, of_mean)
        if step.predict is not None:
            self._foresee(*step.predict)
        tensors = [self.x, *([] if self.y_is_x else [self.y]), answer, *self.past]
        rows = [self._sum(row, [tensors[j] for j in step.columns]) for row in step.coefficients]
        new = rows[: step.new_directions] or [answer]
        self.past = [*new, *self.past][: step.keep]
        self.born = [-k for k in range(1, len(self.past) + 1)]
        moved = rows[step.new_directions :]
        self.y = moved[-1]
        if step.moves_x:
            self.x = moved[0]

    def _sum(self, row: Sequence[Coefficient], tensors: Sequence[tuple[float, float]]) -> tuple[float, float]:
        numbers = [self._number(c) for c in row]
        of_z, of_mean = (sum(c * t[k] for c, t in zip(numbers, tensors, strict=True)) for k in (0, 1))
        return of_z, of_mean

    def _foresee(self, sigma: float, sigma_next: float) -> None:
        """What the predictor says without features, before any was seen: the same for every sample."""
        predictor = self.program.predictor
        assert isinstance(predictor, AMEDPredictor)
        weight = predictor.enc_layer0.weight
        levels = (weight.new_full((1,), level) for level in (sigma, sigma_next))
        with torch.no_grad():
            r, c, time = (float(torch.as_tensor(said).flatten()[0]) for said in predictor(None, *levels))
        m: Any = midpoint_level(sigma, sigma_next, r)  # type: ignore[arg-type]
        self.mid, self.told = (m, r, c), time * m

    def _number(self, c: Coefficient) -> float:
        if not isinstance(c, tuple):
            return c
        assert self.mid is not None
        return sum(weight * value for weight, value in zip(c, basis_at(1.0, *self.mid), strict=True))

    # ---- ticks ----

    def _tick(self, step: Evaluation) -> None:
        tick, size = len(self.matrices), len(BASIS) if self.learned else 1
        if step.predict is not None:
            self.mid = None
        ages = [tick - born for born in self.born]
        columns = [X, *([] if self.y_is_x else [Y]), D, *(2 + age for age in ages)]
        used = [columns[j] for j in step.columns]
        if max(used, default=0) > 2 + self.history:
            raise NoTable(f"a direction {max(used) - 2} evaluations old is older than the {self.history} of a table")
        matrix = torch.zeros(3, 3 + self.history, size, dtype=torch.float64, device="cpu")

        def write(row: int, values: Sequence[Coefficient]) -> None:
            for column, value in zip(used, values, strict=True):
                weights = value if isinstance(value, tuple) and self.mid is None else (self._number(value),)
                matrix[row, column, : len(weights)] = torch.tensor(weights, dtype=torch.float64, device="cpu")

        rows = list(step.coefficients)
        if step.new_directions:
            write(0, rows[0])
        else:
            matrix[0, D, 0] = 1.0
        moved = rows[step.new_directions :]
        write(2, moved[-1])
        if step.moves_x:
            write(1, moved[0])
        else:
            matrix[1, X, 0] = 1.0
        known = None if step.sigma_net is None else step.sigma_net[0]
        self.matrices.append(matrix)
        self.sigmas.append(known if known is not None else self.told if self.mid is not None else 0.0)
        self.intervals.append(step.predict or (0.0, 0.0))
        self.born = [tick, *self.born][: step.keep]
