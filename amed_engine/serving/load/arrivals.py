"""Which requests arrive when, all of it drawn from a seed before the first is sent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import NamedTuple

from amed_engine.errors import ConfigError


class Arrival(NamedTuple):
    """A request, due `at` seconds after the start: a sample for each of the seeds, at `nfe` evaluations."""

    at: float
    nfe: int
    seeds: tuple[int, ...]

    @property
    def evaluations(self) -> int:
        return self.nfe * len(self.seeds)


@dataclass(frozen=True)
class Mix:
    """Whole numbers of at least 1 and the weight of each."""

    weights: dict[int, float]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """From "3:6,5:3,10:1", or "5" for one number alone. Raises ConfigError."""
        try:
            pairs = [part.partition(":") for part in text.split(",")]
            weights = {int(number): float(weight) if colon else 1.0 for number, colon, weight in pairs}
        except ValueError:
            pairs, weights = [], {}
        if not weights or len(weights) < len(pairs) or min(weights) < 1 or not all(map(_is_weight, weights.values())):
            raise ConfigError(
                f"{text!r} is no mix, expected numbers of at least 1, each once with a positive weight, like 3:6,5:3,10:1"
            )
        return cls(weights)

    def draw(self, count: int, chance: Random) -> list[int]:
        """`count` numbers in these shares, the largest remainders rounded up, in an order that is drawn."""
        total = sum(self.weights.values())
        exact = {number: count * weight / total for number, weight in self.weights.items()}
        counts = {number: math.floor(share) for number, share in exact.items()}
        by_remainder = sorted(exact, key=lambda number: counts[number] - exact[number])
        for number in by_remainder[: count - sum(counts.values())]:
            counts[number] += 1
        numbers = [number for number, times in counts.items() for _ in range(times)]
        return sorted(numbers, key=lambda _: chance.random())

    def __str__(self) -> str:
        if len(self.weights) == 1:
            return str(next(iter(self.weights)))
        return ",".join(f"{number}:{weight:g}" for number, weight in self.weights.items())


def _is_weight(weight: float) -> bool:
    return math.isfinite(weight) and weight > 0


@dataclass(frozen=True)
class Load:
    """What is asked of a server, and how fast.

    rate: requests a second, whose gaps are exponentially distributed (a Poisson process); None: all are due at the start, or,
    with `outstanding`, each when one of so many before it is done. timeout: seconds that one may take, from being sent.
    """

    requests: int
    nfe: Mix
    samples: Mix = Mix({1: 1.0})
    rate: float | None = None
    outstanding: int | None = None
    seed: int = 0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.rate is not None and self.outstanding is not None:
            raise ConfigError("rate and outstanding exclude each other; leave one of them out")
        for name in ("requests", "rate", "outstanding", "timeout"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}, expected a number above 0")

    def arrivals(self) -> list[Arrival]:
        """In the order in which they are due; the same for the same numbers. Seeds of samples count up from 0."""
        nfes = self.nfe.draw(self.requests, Random(f"{self.seed} nfe"))
        sizes = self.samples.draw(self.requests, Random(f"{self.seed} samples"))
        ends = accumulate(sizes)
        seeds = [tuple(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
        return [Arrival(*each) for each in zip(self._times(), nfes, seeds, strict=True)]

    def _times(self) -> Iterator[float]:
        if self.rate is None:
            return iter([0.0] * self.requests)
        chance = Random(f"{self.seed} times")
        # Not expovariate: of the generator's methods Python promises the numbers of random() alone.
        return accumulate(-math.log1p(-chance.random()) / self.rate for _ in range(self.requests))

    @property
    def pace(self) -> str:
        """For people."""
        if self.rate is not None:
            return f"at {self.rate:g} requests/s (Poisson, seed {self.seed})"
        return "all at once" if self.outstanding is None else f"{self.outstanding} outstanding"
