"""Solvers as data: `step` states, per network evaluation, where to go next. No image, network or device in sight.

    step(past, sigma, sigma_next, midpoint, i, n) -> list[Stage]

past: noise levels of earlier evaluations, newest first; midpoint: a predictor's word, or None (a `Midpoint`, except
for the solver "nonstationary", whose predictor says a `Row`); i of n intervals.
With a midpoint, a multistep rule runs on the grid refined by m = sigma_next^r · sigma^(1-r), its second half scaled by
scale_dir: that is AMED-Plugin (Zhou et al. 2024, arXiv:2312.00094). It is a learned grid, so every rule has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal

from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.solvers.arguments import plain
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.stage import Midpoint, Stage

Past = tuple[Tensor, ...]
UseOfPredictor = Literal["none", "optional", "required"]


class Solver(ABC):
    """What the loop needs of a solver. Attributes are constants of a solver, never state of a trajectory."""

    # Whether it takes midpoints from a predictor.
    takes_predictor: ClassVar[UseOfPredictor] = "none"
    # Whether its coefficients under a midpoint m are combinations of m and 1/m, so that a table says them with a predictor.
    tabulated: ClassVar[bool] = False
    # Options worth comparing, by what follows the solver's name in tables.
    compared: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}}
    # What a predictor says of an interval.
    answer: ClassVar[type] = Midpoint
    # Whether the state at a noise level is only known after the evaluation there (predictor-corrector).
    corrects: ClassVar[bool] = False
    # Whether it follows the probability-flow ODE of a denoiser. Only then is there a solution to be near to, and a first
    # answer to be foreseen.
    integrates: ClassVar[bool] = True
    # The schedule it runs on where none is named.
    schedule: ClassVar[str] = "time_uniform"

    @property
    def options(self) -> dict[str, Any]:
        """All of them by name."""
        return {option.name: plain(getattr(self, option.name)) for option in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What each option is where it is not named."""
        return {option.name: option.default for option in fields(cls)}  # type: ignore[arg-type]

    @property
    def memory(self) -> int:
        """Past directions, and noise levels, that a later step may read."""
        return 0

    @property
    def data_prediction(self) -> bool:
        """d = D if true, d = (y - D) / sigma otherwise."""
        return False

    @property
    def thresholds(self) -> bool:
        """Every data prediction is thresholded dynamically, as published for DPM-Solver++ and UniPC."""
        return False

    def evaluations(self, with_midpoint: bool) -> int:
        """Network evaluations per interval."""
        return 2

    def noises(self, intervals: int) -> int:
        """Fresh noises of unit variance that it adds on its way, given at the start as older directions, d_1 last."""
        return 0

    def over(self, sigmas: Sequence[Tensor]) -> Solver:
        """The solver for all of these noise levels, where a step depends on more of them than it is told: itself."""
        return self

    def rounds(self, with_midpoint: bool) -> int:
        """Network calls per interval that wait for one another: fewer where evaluations share a call."""
        return self.evaluations(with_midpoint)

    @abstractmethod
    def step(self, past: Past, sigma: Tensor, sigma_next: Tensor, midpoint: Any, i: int, n: int) -> list[Stage]:
        """One stage per evaluation of interval i of n, from sigma to sigma_next."""


def check_first_step_of(solver: Solver, afs: FirstStep | None) -> None:
    """Raises ConfigError for an analytic first step where the first answer is no mean that could be foreseen."""
    if afs and not solver.integrates:
        raise ConfigError(
            f"solver {type(solver).__name__} takes no analytic first step, got afs={afs!r}: a consistency function's first "
            "answer is a sample, not the mean of the data; leave afs out"
        )


def count_intervals(per_interval: int, nfe: int, *, afs: FirstStep) -> int:
    """The intervals on which a trajectory spends `nfe` evaluations; 0 where no whole number does."""
    intervals, rest = divmod(nfe + int(bool(afs)), per_interval)
    return 0 if rest else intervals


def count_evaluations(solver: Solver, intervals: int, *, midpoint: bool, afs: FirstStep = False) -> int:
    """NFE of a trajectory: evaluations per interval, less the one that an analytic first step saves."""
    return solver.evaluations(midpoint) * intervals - int(bool(afs))
