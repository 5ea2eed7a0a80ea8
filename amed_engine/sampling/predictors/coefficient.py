"""A predictor that is all coefficients of the linear program: non-stationary, with or without per-sample offsets."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import check_features
from amed_engine.solvers.arguments import in_range, is_bool, is_positive, is_whole, told
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.stage import Row

MAX_INTERVALS = 15  # `combine` reads at most 16 tensors: x_0 and the evaluations


def described(plan: Plan | None, config: dict) -> str:
    """What a predictor prints of itself."""
    return plan.describe() if plan is not None else ", ".join(f"{name}={value}" for name, value in config.items())


class CoefficientPredictor(nn.Module):
    """All coefficients of the linear program, learned: non-stationary, and per sample where it reads the bottleneck.

        x_{i+1} = a_i x_0 + Σ_{j<=i} b_ij D_j,    (a_i, b_i) = coefficients[i] + heads[i] phi_i(features)

    coefficients: (intervals, intervals + 1), row i holds a_i·sigma_0 and then b_ij, newest first; behind an analytic first
    step about zero (afs) D_0 is a multiple of x_0 and has none. heads: (intervals, intervals + 1, codes), absent if codes = 0.

        phi_i = soft(((mean_c(features), mean_hw(features)) - centre_i) basis_i),   soft(u) = u / sqrt(1 + u²/9)

    with centre (intervals, inputs) and basis (intervals, inputs, codes) the whitened principal components that were seen in
    training, inputs = h·w + C of features (B, C, h, w). soft keeps what was never seen from ruling. Features None: no offset.
    The general linear form is that of Bespoke Non-Stationary Solvers, Shaul et al. 2024 (arXiv:2403.01329).
    """

    centre: Tensor
    basis: Tensor

    def __init__(self, intervals: int, sigma_max: float, *, afs: bool = False, codes: int = 0, inputs: int = 0):
        super().__init__()
        in_range("CoefficientPredictor", "intervals", intervals, 1, MAX_INTERVALS)
        if not all(is_whole(n, 0, 4096) for n in (codes, inputs)) or (codes > 0) > (inputs > 0):
            raise ConfigError(
                f"CoefficientPredictor: codes and inputs must be integers from 0 to 4096, got {told(codes)}, {told(inputs)}"
            )
        is_positive("CoefficientPredictor", "sigma_max", sigma_max)
        is_bool("CoefficientPredictor", "afs", afs)
        self.plan: Plan | None = None
        self.report: Any = None  # of `fit`: how it compares with the best training-free plan; not saved
        self.intervals, self.sigma_max, self.afs = int(intervals), float(sigma_max), afs
        self.codes, self.inputs = int(codes), int(inputs)
        self.coefficients = nn.Parameter(torch.zeros(intervals, intervals + 1, dtype=torch.float64))
        zeros = self.coefficients.detach().new_zeros
        self.heads = nn.Parameter(zeros(intervals, intervals + 1, codes)) if codes else None
        self.register_buffer("centre", zeros(intervals, inputs) if codes else None)
        self.register_buffer("basis", zeros(intervals, inputs, codes) if codes else None)

    def extra_repr(self) -> str:
        return described(self.plan, self.config)

    @property
    def reads_bottleneck(self) -> bool:
        """Whether what it says depends on the network's bottleneck."""
        return self.heads is not None

    @property
    def config(self) -> dict:
        """The constructor's arguments, JSON-able."""
        return {name: getattr(self, name) for name in ("intervals", "sigma_max", "afs", "codes", "inputs")}

    def choices(self) -> list:
        """A Row per interval, or with heads a function (features, sigma, sigma_next) -> Row."""
        if self.heads is None:
            return [self._row(self.coefficients.detach()[i], i) for i in range(self.intervals)]
        return [partial(self._choose, i) for i in range(self.intervals)]

    def width(self, i: int) -> int:
        """How many coefficients row i has: x_0's and one for each evaluation so far."""
        return i + 1 if self.afs else i + 2

    def code(self, features: Tensor | None, i: int, rows: int | None = None) -> Tensor | None:
        """phi_i, (B, codes)."""
        if features is None or self.heads is None:
            return None
        u = (summary(features, rows).to(self.centre.dtype) - self.centre[i]) @ self.basis[i]
        return u / (1 + u.square() / 9).sqrt()

    def _choose(self, i: int, features: Tensor | None, sigma: Tensor, sigma_next: Tensor) -> Row:
        row = self.coefficients[i].expand(sigma.shape[0], -1)  # (B, intervals + 1)
        phi = self.code(features, i, sigma.shape[0])
        if phi is not None:
            row = row + phi @ self.heads[i].mT  # type: ignore[index]
        return self._row(row, i)

    def _row(self, row: Tensor, i: int) -> Row:
        a, *b = row.unbind(-1)[: self.width(i)]
        return Row(a / self.sigma_max, tuple(b))


def summary(features: Tensor, rows: int | None = None) -> Tensor:
    """What a CoefficientPredictor reads of a bottleneck (B, C, h, w): means over channels and over places, (B, h·w + C).

    Raises ConfigError for what is none, or has not this many rows.
    """
    check_features(features, rows=rows)
    return torch.cat([features.mean(1).flatten(1), features.mean((2, 3))], dim=1)
