"""The solver that does what it is told: one learned row per interval, over the starting point and all evaluations so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from amed_engine.program import Row, Stage
from amed_engine.solver import Past, Solver, UseOfMidpoint


@dataclass(frozen=True)
class Nonstationary(Solver):
    """x_{i+1} = a_i x_0 + Σ_{j<=i} b_ij D_j, every coefficient from a predictor: a Row per interval, newest D first.

    The anchor stays at x_0; the noise levels are those the network is told, nothing else depends on them. Shaul et al.
    2024 (arXiv:2403.01329).
    """

    midpoint: ClassVar[UseOfMidpoint] = "required"
    choice: ClassVar[type] = Row

    @property
    def memory(self) -> int:
        return 1 << 10  # every evaluation so far

    @property
    def data_prediction(self) -> bool:
        return True

    def evaluations(self, with_midpoint: bool) -> int:
        return 1

    def step(self, past: Past, sigma: Tensor, sigma_next: Tensor, midpoint: Row, i: int, n: int) -> list[Stage]:
        return [Stage((midpoint,), None)]
