"""The best of many plans for few evaluations: all on a few latents, the better half on twice as many, and so on.

Jamieson and Talwalkar 2016 (arXiv:1502.07943). Every round has as large a share of what is left to spend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.solvers.program import Program
from amed_engine.training.batches import BoundDenoiser
from amed_engine.training.contenders import Contender
from amed_engine.training.gauss_newton import Example
from amed_engine.training.lockstep import together

FIRST = 8  # latents of the first round, or fewer

Spent = Callable[[int], object]  # told of evaluations


@dataclass
class Entrant:
    """A contender, its program, and the mean square error of every latent it ran on so far, (B,) a part."""

    contender: Contender
    program: Program
    squares: list[Tensor] = field(default_factory=list)

    @property
    def errors(self) -> Tensor:
        """RMSE of every latent, (latents,) float64."""
        return torch.cat(self.squares).sqrt()

    @property
    def rmse(self) -> float:
        """Over all its latents; infinite where a sample is not finite."""
        mean = torch.cat(self.squares).mean().sqrt().item()
        return mean if math.isfinite(mean) else math.inf


def halve(
    contenders: Sequence[Contender], examples: Sequence[Example], budget: int, rows: int, spent: Spent = lambda _: None
) -> tuple[list[Entrant], int]:
    """All contenders, those that came furthest first, then the best first; and the evaluations spent, a row each.

    budget: of evaluations, never exceeded. examples: latents with what an exact solver makes of them; the last round is on
    all. rows: of one network call, about. spent: told of every round's evaluations. Raises ConfigError.
    """
    alive = [Entrant(each, each.program()) for each in contenders]
    nfe = max(contender.plan.nfe for contender in contenders)
    rounds, left, out = list(_rounds(examples, _first(len(alive) * nfe, budget))), budget, []
    for k, parts in enumerate(rounds):
        cost = nfe * sum(len(part.x) for part in parts)
        count = min(left // (len(rounds) - k) // cost, -(-len(alive) // 2)) if k else len(alive)
        _check_budget(count, cost, left)
        alive, out = alive[:count], alive[count:] + out
        for part in parts:
            ends, evaluations = together([entrant.program for entrant in alive], part, rows)
            left -= evaluations
            spent(evaluations)
            for entrant, end in zip(alive, ends, strict=True):
                entrant.squares.append((end.double() - part.target.double()).square().flatten(1).mean(1).cpu())
        alive.sort(key=lambda entrant: entrant.rmse)
    if not math.isfinite(alive[0].rmse):
        raise ConfigError("no training-free plan ends in finite samples; look at what the model returns")
    return alive + out, budget - left


def _first(cost: int, budget: int) -> int:
    """Latents of the first round, for which half of the budget is enough; cost: of all contenders on one."""
    return next((n for n in (FIRST, FIRST // 2, FIRST // 4) if 2 * n * cost <= budget), 1)


def _rounds(examples: Sequence[Example], first: int) -> Iterator[list[Example]]:
    """The latents that each round adds: `first`, then as many as before, cut where a denoiser may be."""
    round_, done, stop = [], 0, first
    for example in examples:
        rest: Example | None = example
        while rest is not None:
            if done >= stop:
                yield round_
                round_, stop = [], 2 * done
            part, rest = split(rest, stop - done)
            round_.append(part)
            done += len(part.x)
    yield round_


def split(example: Example, count: int) -> tuple[Example, Example | None]:
    """Its first latents and the others; all of it and none where it is as short, or its denoiser has its conditions bound."""
    if len(example.x) <= count or not isinstance(example.denoiser, BoundDenoiser):
        return example, None
    return _rows(example, slice(count)), _rows(example, slice(count, None))


def _rows(example: Example, part: slice) -> Example:
    denoiser, x, target, mean = example
    assert isinstance(denoiser, BoundDenoiser)
    labels = None if denoiser.labels is None else denoiser.labels[part]
    own = mean if mean is None or len(mean) == 1 else mean[part]
    return Example(replace(denoiser, labels=labels), x[part], target[part], own)


def _check_budget(count: int, cost: int, left: int) -> None:
    if not count or count * cost > left:
        raise ConfigError(
            f"a round of {max(count, 1)} plans may cost {max(count, 1) * cost} evaluations, and {left} are left; pass smaller "
            "batches where conditions are denoisers, or a smaller nfe"
        )
