"""A predictor that is numbers: constant midpoints, for AMED, EPD and the plugins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from amed_engine.sampling.predictors.coefficient import MAX_INTERVALS, described
from amed_engine.solvers.arguments import in_range
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.stage import Midpoint


class ConstantPredictor(nn.Module):
    """r, scale_dir and scale_time as numbers: the same for every sample, without a network or a bottleneck.

    Parameters of shape (intervals, points) each; points > 1 is EPD-Solver with its weights folded into scale_dir.
    `plan` says what it was trained for. Zhou et al. 2024 (arXiv:2312.00094), Zhu et al. 2025 (arXiv:2507.14797).
    """

    def __init__(self, intervals: int, points: int = 1):
        super().__init__()
        in_range("ConstantPredictor", "intervals", intervals, 1, MAX_INTERVALS)
        in_range("ConstantPredictor", "points", points, 1, 7)  # as many as `amed` takes
        self.plan: Plan | None = None
        self.report: Any = None  # of `fit`: how it compares with the best training-free plan; not saved
        self.intervals, self.points = int(intervals), int(points)
        # Points spread over the interval, together a step in the mean of their directions.
        spread = torch.arange(1, points + 1, dtype=torch.float64) / (points + 1)
        self.r = nn.Parameter(spread.repeat(intervals, 1))
        self.scale_dir = nn.Parameter(torch.full((intervals, points), 1 / points, dtype=torch.float64))
        self.scale_time = nn.Parameter(torch.ones(intervals, points, dtype=torch.float64))

    @classmethod
    def of(cls, midpoints: Sequence[Midpoint]) -> ConstantPredictor:
        """The predictor that always says these midpoints."""
        table = [[torch.as_tensor(field, dtype=torch.float64).reshape(-1) for field in mid] for mid in midpoints]
        predictor = cls(len(table), max(len(field) for field in table[0]))
        with torch.no_grad():
            for k, parameter in enumerate((predictor.r, predictor.scale_dir, predictor.scale_time)):
                parameter.copy_(torch.stack([fields[k].expand(predictor.points) for fields in table]))
        return predictor

    def extra_repr(self) -> str:
        return described(self.plan, self.config)

    @property
    def reads_bottleneck(self) -> bool:
        """Whether what it says depends on the network's bottleneck."""
        return False

    @property
    def config(self) -> dict:
        """The constructor's arguments, JSON-able."""
        return {"intervals": self.intervals, "points": self.points}

    def choices(self) -> list[Midpoint]:
        """One Midpoint per interval, each field () or (points,)."""
        fields = [parameter.detach().squeeze(1) for parameter in (self.r, self.scale_dir, self.scale_time)]
        return [Midpoint(*values) for values in zip(*fields, strict=True)]
