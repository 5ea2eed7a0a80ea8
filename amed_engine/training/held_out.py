"""Whether a predictor pays: against plans that need none, on latents that it was not learned from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from amed_engine.engine.model import Model
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoiser
from amed_engine.sampling.loop import integrate, sample
from amed_engine.sampling.predictors import Predictor
from amed_engine.solvers.plan import Plan, best_training_free, make_plan
from amed_engine.training.batches import BoundDenoiser
from amed_engine.training.gauss_newton import Example
from amed_engine.training.halving import some_of
from amed_engine.training.presets import TEACHER, noise_range

LATENTS = 64  # at most
FINE = 32  # evaluations of the solution that is taken for exact, twice the plans' own where those are many
REPORTED = {"reported": True}  # of log records that commands print themselves
STREAM = 1 << 40  # beyond the seeds of what is learned from


class HeldOut(NamedTuple):
    """RMSE to a fine solution: of the predictor, and of `free`, the best of the training-free plans that it was put beside.

    latents: how many, none of them learned from. evaluations: what finding out cost, of the network, a row each. remedy: what
    may help a predictor that lost.
    """

    rmse: float
    free_rmse: float
    free: Plan
    latents: int
    evaluations: int
    remedy: str

    @property
    def lost(self) -> bool:
        return not self.rmse <= self.free_rmse  # a NaN loses

    def __str__(self) -> str:
        share = self.rmse / self.free_rmse if self.free_rmse else math.inf
        where = f"on {self.latents} latents that it was not learned from"
        cost = f"{self.evaluations} evaluations told"
        if not self.lost:
            told = (
                f"RMSE {self.rmse:.4f} to a fine solution, {share:.2f} of the {self.free_rmse:.4f} without a predictor"
            )
            return f"{where} {told} ({self.free.describe()}; {cost})"
        return (
            f"it lost to a training-free solver: {where} its RMSE to a fine solution is {self.rmse:.4f}, {share:.2f} times "
            f"the {self.free_rmse:.4f} of {self.free.describe()}, which needs no predictor ({cost}); {self.remedy}, or "
            'sample without it: predictor="none", or plan= with that plan'
        )


def default_plan(model: Model, nfe: int) -> Plan:
    """What a Sampler runs without a predictor."""
    return best_training_free(nfe, **noise_range(model))


@torch.no_grad()
def judge(
    plan: Plan, predictor: Predictor, free: Sequence[Plan], examples: Sequence[Example], fine: Plan, remedy: str
) -> HeldOut:
    """free: the training-free plans. fine: what solved the examples."""
    errors = {other: _rmse(other, None, examples) for other in dict.fromkeys(free)}
    best = min(errors, key=lambda other: errors[other] if math.isfinite(errors[other]) else math.inf)
    latents = sum(len(example.x) for example in examples)
    spent = latents * (fine.nfe + plan.nfe + sum(other.nfe for other in errors))
    return HeldOut(_rmse(plan, predictor, examples), errors[best], best, latents, spent, remedy)


def _rmse(plan: Plan, predictor: Predictor | None, examples: Sequence[Example]) -> float:
    squares = []
    for example in examples:
        learned = None if predictor is None else copy.deepcopy(predictor).to(example.x.device).eval().choices()
        program = replace(plan.program(learned).on(example.x.device, example.x.dtype), mean=None)
        squares.append(example.squares(integrate(program, example.denoiser, example.x, mean=example.mean)[-1]))
    return torch.cat(squares).mean().sqrt().item()


def fine_plan(model: Model, nfe: int) -> Plan:
    """Of the solution that stands for the exact one, beside plans of this NFE."""
    return make_plan(max(FINE, 2 * nfe), afs=False, **noise_range(model), **TEACHER)


def unseen(examples: Sequence[Example], fine: Plan, seed: int, count: int, rows: int) -> Iterator[Example]:
    """About `count` new latents with the conditions of these examples, at most `rows` at a time; seed: of what was learned."""
    generator = torch.Generator().manual_seed(seed + STREAM)
    for example in examples:
        numbers = torch.arange(min(max(count, 0), len(example.x)), device="cpu")
        can_cut = isinstance(example.denoiser, BoundDenoiser)
        for some in numbers.split(rows if can_cut else len(example.x)):
            if len(some):
                part = some_of(example, some)
                noise = torch.empty(part.x.shape, dtype=torch.float32, device="cpu").normal_(generator=generator)
                yield solved(part.denoiser, noise.to(part.x) * fine.sigmas[0], fine, part.mean)
                count -= len(part.x)


@torch.no_grad()
def solved(denoiser: Denoiser, x: Tensor, teacher: Plan, mean: Tensor | None) -> Example:
    images = sample(denoiser, x, teacher.levels, teacher.make_solver())
    if not bool(images.isfinite().all()):
        raise ConfigError("the teacher's samples are not finite; look at what the model returns")
    return Example(denoiser, x, images, None if mean is None else mean.to(x))
