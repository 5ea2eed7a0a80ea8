"""Multistep consistency sampling: no solver of an ODE, but a walk that adds fresh noise between its evaluations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from amed_engine.solvers.base import Past, Solver
from amed_engine.solvers.stage import Midpoint, Row, Stage


@dataclass(frozen=True)
class Consistency(Solver):
    """Song et al. 2023 (arXiv:2303.01469), algorithm 1, for a consistency function D = f(x, s), a sample at noise level eps:

        x' = D + sqrt(s'² - eps²) z,   at the last evaluation x' = D,   z ~ N(0, 1) fresh

    eps is the last noise level, s_n, which is not evaluated. The noises are older directions given at the start: each
    evaluation keeps its D as the newest one and drops the oldest, which is the noise that it has used.
    """

    integrates: ClassVar[bool] = False
    schedule: ClassVar[str] = "polynomial"
    _levels: ClassVar[tuple[Tensor, ...]] = ()  # of an instance once `over` knows them; no option

    @property
    def memory(self) -> int:
        return self.noises(len(self._levels) - 1)

    @property
    def data_prediction(self) -> bool:
        return True

    def evaluations(self, with_midpoint: bool) -> int:
        return 1

    def noises(self, intervals: int) -> int:
        return max(intervals - 1, 0)

    def over(self, sigmas: Sequence[Tensor]) -> Solver:
        known = copy.copy(self)
        vars(known)["_levels"] = tuple(sigmas)
        return known

    def step(
        self, past: Past, sigma: Tensor, sigma_next: Tensor, midpoint: Midpoint | None, i: int, n: int
    ) -> list[Stage]:
        if i + 1 == n:
            return [Stage((Row(0.0, (1.0,)),), x_is_y=True)]
        added = (sigma_next**2 - self._levels[-1] ** 2).sqrt()
        return [Stage((Row(0.0, (1.0, *[0.0] * (self.memory - 1), added)),), x_is_y=True)]
