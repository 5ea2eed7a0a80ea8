"""Solvers of two evaluations per step and no memory: Heun, DPM-Solver-2, AMED-Solver and its parallel form EPD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.solvers import rules
from amed_engine.solvers.arguments import in_range, told
from amed_engine.solvers.base import Past, Solver, UseOfPredictor
from amed_engine.solvers.stage import Midpoint, Row, Stage


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method, corrected on every interval. Karras et al. 2022 (arXiv:2206.00364), algorithm 1."""

    def step(
        self, past: Past, sigma: Tensor, sigma_next: Tensor, midpoint: Midpoint | None, i: int, n: int
    ) -> list[Stage]:
        h = sigma_next - sigma
        row = Row(1.0, (h / 2, h / 2))
        return [Stage((Row(1.0, (h,)),), sigma=sigma_next), Stage((row,), x_is_y=True)]


@dataclass(frozen=True)
class DPM2(Solver):
    """DPM-Solver-2: an Euler step to m = s'^r s^(1-r), then x' = x + h [e/(2r) + (1 - 1/(2r)) d]. arXiv:2206.00927.

    A midpoint replaces r and brings both scales.
    """

    r: float = 0.5
    takes_predictor: ClassVar[UseOfPredictor] = "optional"
    tabulated: ClassVar[bool] = True
    compared: ClassVar = {"-2": {}}

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, (int, float)) or not 0 < self.r <= 1:
            raise ConfigError(f"dpm: r must be in (0, 1], got {told(self.r)}")

    def step(
        self, past: Past, sigma: Tensor, sigma_next: Tensor, midpoint: Midpoint | None, i: int, n: int
    ) -> list[Stage]:
        mid = midpoint or Midpoint(sigma.new_tensor(self.r))
        m, h = rules.midpoint_level(sigma, sigma_next, mid.r), sigma_next - sigma
        share = 1 / (2 * mid.r)
        row = Row(1.0, (h * share, h * (1 - share))).scaled(mid.scale_dir)
        return [Stage((Row(1.0, (m - sigma,)),), sigma=m, sigma_net=mid.scale_time * m), Stage((row,), x_is_y=True)]


@dataclass(frozen=True)
class AMED(Solver):
    """AMED-Solver: a step along the learned mean direction. Zhou et al. 2024 (arXiv:2312.00094).

        m = s'^r s^(1-r),   y = x + (m - s) d,   e = (y - D(y; scale_time·m)) / m,   x' = x + scale_dir (s' - s) e

    With points K > 1 every field of the midpoint has K leading entries, the K points are evaluated in one batched call
    and x' = x + (s' - s) Σ_k scale_dir_k e_k: EPD-Solver, its simplex weights folded into scale_dir (arXiv:2507.14797).
    """

    points: int = 1
    takes_predictor: ClassVar[UseOfPredictor] = "required"
    tabulated: ClassVar[bool] = True

    def __post_init__(self):
        in_range("amed", "points", self.points, 1, 7)  # x, K points and K answers are at most 16 sources of `combine`

    def evaluations(self, with_midpoint: bool) -> int:
        return 1 + self.points

    def rounds(self, with_midpoint: bool) -> int:
        return 2

    def step(
        self, past: Past, sigma: Tensor, sigma_next: Tensor, midpoint: Midpoint | None, i: int, n: int
    ) -> list[Stage]:
        if midpoint is None:
            raise ConfigError("solver 'amed' needs a midpoint for every interval; pass a predictor")
        h = sigma_next - sigma
        points = [self._point(midpoint, k) for k in range(self.points)]
        m = tuple(rules.midpoint_level(sigma, sigma_next, p.r) for p in points)
        y = tuple(Row(1.0, (level - sigma,)) for level in m)
        row = Row(1.0, tuple(p.scale_dir * h for p in points))
        told = tuple(p.scale_time * level for p, level in zip(points, m, strict=True))
        return [Stage(y, sigma=m, sigma_net=told), Stage((row,), x_is_y=True)]

    def _point(self, midpoint: Midpoint, k: int) -> Midpoint:
        if self.points == 1:
            return midpoint
        if sizes := [n for n in map(_entries, midpoint) if n != self.points]:
            raise ConfigError(
                f"amed with points={self.points} needs {self.points} leading entries in r, scale_dir and scale_time, got "
                f"{sizes[0] or 'a number'}; pass a tensor ({self.points},) or ({self.points}, B) for each"
            )
        return Midpoint(*(field[k] for field in midpoint))  # type: ignore[index]


def _entries(field: Tensor | float) -> int:
    """Leading entries of a field of a midpoint, 0 for a number."""
    return len(field) if isinstance(field, Tensor) and field.dim() else 0
