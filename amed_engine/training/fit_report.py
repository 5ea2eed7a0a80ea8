"""How a fitted predictor compares with the best training-free plan, on the latents that it was fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amed_engine.sampling.loop import integrate
from amed_engine.solvers.plan import Plan
from amed_engine.training.candidate import Candidate
from amed_engine.training.contenders import Contender
from amed_engine.training.gauss_newton import Example
from amed_engine.training.held_out import HeldOut
from amed_engine.training.lockstep import together


class Report(NamedTuple):
    """RMSE to the teacher and the median of the latents' own RMSE: of the predictor, and of the best training-free plan,
    `free`. held_out: on other latents than those of the fit."""

    rmse: float
    median: float
    free_rmse: float
    free_median: float
    free: Plan
    latents: int
    held_out: HeldOut | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, candidate: Candidate, free: Contender, examples: Sequence[Example], rows: int) -> Report:
        """rows: of one network call."""
        program = free.program()
        mine = [integrate(candidate.program(each.x), each.denoiser, each.x, mean=each.mean)[-1] for each in examples]
        theirs = [together([program], each, rows)[0][0] for each in examples]
        return cls(
            *_errors(mine, examples), *_errors(theirs, examples), free.plan, sum(len(each.x) for each in examples)
        )

    def __str__(self) -> str:
        share = self.rmse / self.free_rmse if self.free_rmse else math.inf
        return (
            f"RMSE {self.rmse:.4f}, median {self.median:.4f}, on the {self.latents} latents of the fit, {share:.2f} of the "
            f"{self.free_rmse:.4f}, {self.free_median:.4f}, of the best training-free plan there ({self.free.describe()})"
            + ("" if self.held_out is None else f"; {self.held_out}")
        )


def _errors(ends: Sequence[Tensor], examples: Sequence[Example]) -> tuple[float, float]:
    """RMSE over all latents, and the median of each one's own."""
    squares = torch.cat([example.squares(end) for end, example in zip(ends, examples, strict=True)])
    return squares.mean().sqrt().item(), squares.median().sqrt().item()
