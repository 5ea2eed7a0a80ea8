"""Outcomes as numbers: how much was done, how long it took, what went wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amed_engine.serving.load.arrivals import Load
from amed_engine.serving.load.loop import Outcome


@dataclass(frozen=True)
class Percentiles:
    """Of `count` durations, in seconds; between two of them linearly, as NumPy does."""

    count: int
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles | None:
        """None of no durations at all."""
        if not seconds:
            return None
        ordered = sorted(seconds)
        p50, p95, p99 = (_quantile(ordered, q) for q in (0.5, 0.95, 0.99))
        return cls(len(ordered), p50, p95, p99, ordered[-1])


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class LoadReport:
    """What a server made of a load.

    samples, evaluations: of the requests answered; a guided evaluation, of both halves, is one. seconds: from the start to the
    last outcome. latency: of the requests answered, from when they were due, in seconds; by_nfe: the same of each number of
    evaluations. useful: evaluations that were asked for, as a part of the rows that the network computed meanwhile for
    everybody; None where the target does not say. late: the longest that a request was sent after it was due, in seconds.
    reasons: what refused and failed requests were told, and how often.
    """

    target: str
    pace: str
    nfe: str
    sizes: str
    requests: int
    answered: int
    refused: int
    failed: int
    samples: int
    evaluations: int
    seconds: float
    samples_per_second: float
    evaluations_per_second: float
    latency: Percentiles | None
    by_nfe: dict[int, Percentiles]
    useful: float | None
    late: float
    reasons: dict[str, int]

    @classmethod
    def of(cls, load: Load, outcomes: Sequence[Outcome], target: str, useful: float | None = None) -> LoadReport:
        answered = [each for each in outcomes if each.kind == "answered"]
        samples = sum(len(each.arrival.seeds) for each in answered)
        evaluations = sum(each.arrival.evaluations for each in answered)
        seconds = max(each.done for each in outcomes) - min(each.due - each.arrival.at for each in outcomes)
        return cls(
            target=target,
            pace=load.pace,
            nfe=str(load.nfe),
            sizes=str(load.samples),
            requests=len(outcomes),
            answered=len(answered),
            refused=sum(each.kind == "refused" for each in outcomes),
            failed=sum(each.kind == "failed" for each in outcomes),
            samples=samples,
            evaluations=evaluations,
            seconds=seconds,
            samples_per_second=samples / seconds,
            evaluations_per_second=evaluations / seconds,
            latency=Percentiles.of([each.latency for each in answered]),
            by_nfe=_by_nfe(answered),
            useful=useful,
            late=max(each.sent - each.due for each in outcomes),
            reasons=dict(Counter(each.reason for each in outcomes if each.reason)),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """For people."""
        useful = "not told" if self.useful is None else f"{self.useful:.1%}"
        rows = [("all", self.latency), *((f"NFE {nfe}", found) for nfe, found in self.by_nfe.items())]
        return "\n".join(
            [
                f"{self.requests} requests to {self.target}, {self.pace}; NFE {self.nfe}, samples {self.sizes}",
                f"answered {self.answered}, refused {self.refused}, failed {self.failed} in {self.seconds:.2f} s",
                f"{self.samples_per_second:.4g} samples/s, {self.evaluations_per_second:.4g} evaluations/s",
                f"{'latency, ms':12}{'requests':>9}{'p50':>10}{'p95':>10}{'p99':>10}{'max':>10}",
                *(_line(name, found) for name, found in rows if found),
                f"useful rows {useful}; sent at most {self.late * 1e3:.1f} ms late",
                *(f"{count} times: {reason}" for reason, count in self.reasons.items()),
            ]
        )


def _by_nfe(answered: Sequence[Outcome]) -> dict[int, Percentiles]:
    found = {}
    for nfe in sorted({each.arrival.nfe for each in answered}):
        found[nfe] = Percentiles.of([each.latency for each in answered if each.arrival.nfe == nfe])
    return found


def _line(name: str, found: Percentiles) -> str:
    times = (found.p50, found.p95, found.p99, found.max)
    return f"{name:12}{found.count:9}" + "".join(f"{1e3 * seconds:10.1f}" for seconds in times)
