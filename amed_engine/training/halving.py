"""The best of many plans for few evaluations: all on a few latents, the better half on twice as many, and so on.

Jamieson and Talwalkar 2016 (arXiv:1502.07943). Every round has as large a share of what is left to spend.

On trained networks half of a plan's squared error can lie in one latent of a hundred, and these are about the same of all
plans: few latents drawn evenly tell nothing of them. So a handful of plans, the pilots, run on all latents first; the latents
that are hardest for them come first, and count for their own number, the others for theirs (stratified sampling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.solvers.program import Program
from amed_engine.training.batches import BoundDenoiser
from amed_engine.training.contenders import Contender
from amed_engine.training.gauss_newton import Example
from amed_engine.training.lockstep import together

FIRST = 8  # latents of the first round, or fewer
HARD = 16  # one latent in so many is hard
PILOT = "deis-3"  # on each schedule
MOST = 0.25  # of the budget, for the pilots

Spent = Callable[[int], object]  # told of evaluations


@dataclass
class Entrant:
    """A contender, its program, and the mean square error of every latent, (latents,) float64: below 0 where it did not run.

    hard: the latents that are, (latents,) bool.
    """

    contender: Contender
    program: Program
    squares: Tensor
    hard: Tensor

    @property
    def measured(self) -> Tensor:
        """The latents that it ran on, (latents,) bool. A square that is no number is one of these."""
        return ~(self.squares < 0)

    @property
    def rmse(self) -> float:
        """Over all latents, as far as it is known; infinite where a sample is not finite."""
        mean = (self._weights * self.squares)[self.measured].sum().sqrt().item()
        return mean if math.isfinite(mean) else math.inf

    @property
    def median(self) -> float:
        """Of every latent's own RMSE, as far as it is known."""
        errors, order = self.squares[self.measured].sqrt().sort()
        below = self._weights[self.measured][order].cumsum(0)
        return errors[below >= 0.5 - 1e-9][0].item()  # sums of weights are rounded

    @property
    def _weights(self) -> Tensor:
        """What each latent counts for, (latents,): all that are hard, or not, over those of them that it ran on."""
        weights = torch.zeros_like(self.squares)
        for kind in (self.hard, ~self.hard):
            ran = kind & self.measured
            weights[ran] = int(kind.sum()) / max(1, int(ran.sum()))
        return weights / weights.sum()


class Part(NamedTuple):
    """Some latents of an example, and their numbers among all."""

    example: Example
    numbers: Tensor


def halve(
    contenders: Sequence[Contender], examples: Sequence[Example], budget: int, rows: int, spent: Spent = lambda _: None
) -> tuple[list[Entrant], int]:
    """All contenders, those that came furthest first, then the best first; and the evaluations spent, a row each.

    budget: of evaluations, never exceeded. examples: latents with what an exact solver makes of them; the last round is on
    all. rows: of one network call, about. spent: told of every round's evaluations. Raises ConfigError.
    """
    nfe = max(contender.plan.nfe for contender in contenders)
    hard, cost = _hard(contenders, examples, budget, rows)
    left = budget - cost
    spent(cost)
    unknown = torch.full(hard.shape, -1.0, dtype=torch.float64, device="cpu")
    alive = [Entrant(each, each.program(), unknown.clone(), hard) for each in contenders]
    rounds, out = list(_rounds(examples, _turns(hard), _first(len(alive) * nfe, left))), []
    for k, parts in enumerate(rounds):
        cost = nfe * sum(len(part.numbers) for part in parts)
        count = min(left // (len(rounds) - k) // cost, -(-len(alive) // 2)) if k else len(alive)
        _check_budget(count, cost, left)
        alive, out = alive[:count], alive[count:] + out
        for part in parts:
            squares, evaluations = _squares([entrant.program for entrant in alive], part.example, rows)
            left -= evaluations
            spent(evaluations)
            for entrant, found in zip(alive, squares, strict=True):
                entrant.squares[part.numbers] = found
        alive.sort(key=lambda entrant: entrant.rmse)
    if not math.isfinite(alive[0].rmse):
        raise ConfigError("no training-free plan ends in finite samples; look at what the model returns")
    return alive + out, budget - left


def _squares(programs: Sequence[Program], example: Example, rows: int) -> tuple[list[Tensor], int]:
    """The mean square error of each latent, (B,) float64 a program, and how many evaluations they cost."""
    ends, evaluations = together(programs, example, rows)
    return [example.squares(end).cpu() for end in ends], evaluations


def _hard(contenders: Sequence[Contender], examples: Sequence[Example], budget: int, rows: int) -> tuple[Tensor, int]:
    """Which latents are hard, (latents,) bool, and what finding out cost; none where that is much of the budget, or latents
    cannot be cut out of their examples anyway."""
    pilots = _pilots(contenders)
    hard = torch.zeros(sum(len(example.x) for example in examples), dtype=torch.bool, device="cpu")
    cost = len(hard) * sum(pilot.plan.nfe for pilot in pilots)
    if cost > budget * MOST or not all(isinstance(example.denoiser, BoundDenoiser) for example in examples):
        return hard, 0
    runs = [_squares([pilot.program() for pilot in pilots], example, rows) for example in examples]
    errors = torch.cat([torch.stack(squares) for squares, _ in runs], dim=1)
    shares = errors / errors.mean(1, keepdim=True)  # of each pilot's error, so that none outweighs the others
    hard[shares.nan_to_num(1).sum(0).topk(-(-len(hard) // HARD)).indices] = True
    return hard, sum(evaluations for _, evaluations in runs)


def _pilots(contenders: Sequence[Contender]) -> list[Contender]:
    """Those that tell which latents are hard: one a schedule."""
    known = [contender for contender in contenders if contender.name == PILOT] or contenders[:1]
    return list({contender.plan.schedule: contender for contender in reversed(known)}.values())


def _turns(hard: Tensor) -> Tensor:
    """When each latent's turn comes, (latents,): a hard one, another, a hard one, and so on, then what is left."""
    numbers = torch.arange(len(hard), device="cpu")
    turns = torch.empty_like(numbers)
    turns[hard], turns[~hard] = 2 * numbers[: int(hard.sum())], 2 * numbers[: int((~hard).sum())] + 1
    return turns


def _first(cost: int, budget: int) -> int:
    """Latents of the first round, for which half of the budget is enough; cost: of all contenders on one."""
    return next((n for n in (FIRST, FIRST // 2, FIRST // 4) if 2 * n * cost <= budget), 1)


def _rounds(examples: Sequence[Example], turns: Tensor, first: int) -> Iterator[list[Part]]:
    """The latents that each round adds, in their turns: `first`, then as many as before."""
    added, done, stop = [], 0, first
    for piece in sorted(_pieces(examples), key=lambda numbers: int(turns[numbers].min())):
        if done >= stop:
            yield list(_parts(examples, torch.cat(added)))
            added, stop = [], 2 * done
        added.append(piece)
        done += len(piece)
    yield list(_parts(examples, torch.cat(added)))


def _pieces(examples: Sequence[Example]) -> Iterator[Tensor]:
    """Numbers of latents that stay together: one, or all of a denoiser with conditions of its own bound."""
    done = 0
    for example in examples:
        numbers = torch.arange(done, done + len(example.x), device="cpu")
        yield from numbers.split(1 if isinstance(example.denoiser, BoundDenoiser) else len(numbers))
        done += len(numbers)


def _parts(examples: Sequence[Example], numbers: Tensor) -> Iterator[Part]:
    """These latents, an example each of those that have some."""
    done = 0
    for example in examples:
        own = numbers[(numbers >= done) & (numbers < done + len(example.x))].sort().values
        if len(own):
            yield Part(some_of(example, own - done), own)
        done += len(example.x)


def some_of(example: Example, numbers: Tensor) -> Example:
    """Some of its latents; all where its denoiser has conditions of its own bound."""
    denoiser, x, target, mean = example
    if not isinstance(denoiser, BoundDenoiser):
        return example
    numbers = numbers.to(x.device)
    labels = None if denoiser.labels is None else denoiser.labels[numbers.to(denoiser.labels.device)]
    own = mean if mean is None or len(mean) == 1 else mean[numbers]
    return Example(replace(denoiser, labels=labels), x[numbers], target[numbers], own)


def _check_budget(count: int, cost: int, left: int) -> None:
    if not count or count * cost > left:
        raise ConfigError(
            f"a round of {max(count, 1)} plans may cost {max(count, 1) * cost} evaluations, and {left} are left; pass smaller "
            "batches where conditions are denoisers, or a smaller nfe"
        )
