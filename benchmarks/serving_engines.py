"""Requests of mixed evaluations in this process: as rows of ticks, one at a time, grouped; and what a tick costs."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from contestants import graphed
from harness import Contestant, HostClock, compete, measure
from plain_loop import image_of
from torch import Tensor, nn
from workloads import WORKLOADS

from amed_engine import ContinuousSampler, Sampler
from amed_engine.serving.load import Arrival, EngineTarget, Load, Mix, Percentiles, offer

CPU = torch.device("cpu")
MIXED, ALONE = Mix({3: 6, 5: 3, 10: 1}), Mix({3: 1})
MODEL = "digits"
TOLERANCE = 2e-5  # of the largest element, in float32
TICKS = "ContinuousSampler, all submitted at once"
SINGLE = "Sampler.run, one at a time"
GROUPED = "Sampler.run, grouped by NFE"


class Bench:
    """The same requests, and everything that draws them, warm."""

    def __init__(self, rows: int, requests: int):
        self.rows, self.arrivals = rows, Load(requests, MIXED).arrivals()
        self.samplers = {nfe: Sampler(MODEL, nfe=nfe, device=CPU) for nfe in MIXED.weights}
        self.engine = ContinuousSampler(MODEL, rows=rows, device=CPU, queue=max(1024, requests))

    def contestants(self) -> list[Contestant]:
        """Sampler.run first: the others are compared with it."""
        limited = f"{GROUPED}, at most {self.rows} at once"
        return [
            Contestant(SINGLE, lambda: self.one_at_a_time),
            Contestant(TICKS, lambda: self.ticks, tolerance=TOLERANCE),
            Contestant(GROUPED, lambda: lambda: self.grouped(len(self.arrivals)), tolerance=TOLERANCE),
            Contestant(limited, lambda: lambda: self.grouped(self.rows), tolerance=TOLERANCE),
        ]

    def ticks(self) -> Tensor:
        futures = [self.engine.submit(list(arrival.seeds), nfe=arrival.nfe) for arrival in self.arrivals]
        return torch.cat([future.result().images for future in futures])

    def one_at_a_time(self) -> Tensor:
        return torch.cat([self.samplers[each.nfe].run(list(each.seeds)).images for each in self.arrivals])

    def grouped(self, size: int) -> Tensor:
        """All requests in hand, those of one NFE as batches of at most `size`; the images in the order of the requests."""
        images: dict[int, Tensor] = {}
        for nfe, sampler in self.samplers.items():
            seeds = [seed for each in self.arrivals if each.nfe == nfe for seed in each.seeds]
            for start in range(0, len(seeds), size):
                part = seeds[start : start + size]
                images |= zip(part, sampler.run(part).images, strict=True)
        return torch.stack([images[seed] for each in self.arrivals for seed in each.seeds])


def saturation(bench: Bench, rounds: int) -> dict[str, Any]:
    """All requests at once, by every contestant in turns: seconds of every round, and medians of the rounds' ratios."""
    before = bench.engine.stats()
    rows = compete(bench.contestants(), CPU, rounds=rounds, budget=float("inf"))
    after, ours = bench.engine.stats(), rows[TICKS]
    if "skipped" in ours:
        raise RuntimeError(f"{TICKS}: {ours['skipped']}")
    for row in rows.values():
        if "seconds" in row:
            pairs = zip(row["wall_seconds"], ours["wall_seconds"], strict=True)
            row["ticks_are_times_faster"] = statistics.median(theirs / mine for theirs, mine in pairs)
    evaluations = sum(arrival.evaluations for arrival in bench.arrivals)
    return {
        "requests": len(bench.arrivals),
        "rows": bench.rows,
        "evaluations": evaluations,
        "requests_per_second": len(bench.arrivals) / ours["seconds"],
        "evaluations_per_second": evaluations / ours["seconds"],
        "useful": (after.evaluations - before.evaluations) / (after.evaluated - before.evaluated),
        "contestants": rows,
    }


def latency(bench: Bench, rate: float, requests: int, rounds: int) -> dict[str, Any]:
    """Requests of three evaluations beside longer ones, and alone at as many evaluations a second, in turns.

    rate: mixed requests a second. A round has its own arrivals, by its number; of those alone so many that both take as long.
    """
    share = sum(arrival.evaluations for arrival in bench.arrivals) / len(bench.arrivals) / 3
    loads = {"mixed": (requests, MIXED, rate), "alone": (round(requests * share), ALONE, rate * share)}
    seconds: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in loads}
    for number in range(rounds):
        for name in [*loads][:: 1 if number % 2 else -1]:
            count, mix, pace = loads[name]
            seconds[name].append(_latencies(bench, Load(count, mix, rate=pace, seed=number).arrivals()))
    ratios = [_p95(mixed) / _p95(alone) for mixed, alone in zip(seconds["mixed"], seconds["alone"], strict=True)]
    return {
        **{name: {"rate": loads[name][2], **_pooled(found)} for name, found in seconds.items()},
        "p95_of_3_ratios": ratios,
        "p95_of_3_ratio": statistics.median(ratios),
    }


def _latencies(bench: Bench, arrivals: Sequence[Arrival]) -> list[tuple[int, float]]:
    """(evaluations, seconds) of each request. Raises RuntimeError where one was not answered."""
    outcomes = asyncio.run(offer(arrivals, EngineTarget(bench.engine).ask))
    if reasons := [each.reason for each in outcomes if each.kind != "answered"]:
        raise RuntimeError(f"{len(reasons)} requests were not answered, the first: {reasons[0]}")
    return [(each.arrival.nfe, each.latency) for each in outcomes]


def _p95(found: Sequence[tuple[int, float]]) -> float:
    of_3 = Percentiles.of([seconds for nfe, seconds in found if nfe == 3])
    assert of_3 is not None
    return of_3.p95


def _pooled(rounds: Sequence[Sequence[tuple[int, float]]]) -> dict[str, Any]:
    """Percentiles of all rounds together, and the p95 of three evaluations in each."""
    every = [each for found in rounds for each in found]
    groups = {"all": every, **{f"NFE {nfe}": [each for each in every if each[0] == nfe] for nfe in MIXED.weights}}
    found = {name: Percentiles.of([seconds for _, seconds in group]) for name, group in groups.items()}
    return {**{name: vars(each) for name, each in found.items() if each}, "p95_of_3_rounds": [*map(_p95, rounds)]}


# ---- what a tick costs

EVALUATIONS = 10  # of each sample
GENERATIONS = 4  # of samples in each row, one after the other, in one measurement


def overhead(workload: str, rows: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Ticks of one bucket whose rows are all taken, admission and delivery among them, beside the network alone, in turns.

    On a GPU the network alone is a replayed graph.
    """
    chosen = WORKLOADS[workload]
    network, ticks = chosen.build().to(device), EVALUATIONS * GENERATIONS
    counted: list[tuple[int, float, float]] = []
    engine = ContinuousSampler(network, rows=rows, buckets=(rows,), device=device, shape=chosen.shape)
    with engine:
        engine.warmup()

        def tick() -> None:
            before = engine.stats()
            engine.submit(GENERATIONS * rows, nfe=EVALUATIONS).result()
            after = engine.stats()
            took = (after.tick_seconds - before.tick_seconds, after.network_seconds - before.network_seconds)
            counted.append((after.ticks - before.ticks, *took))

        alone = _alone(network, chosen.shape, chosen.classes, rows, device, ticks)
        times = measure(
            {"ticks": (tick, ticks), "network": (alone, ticks)}, HostClock(), rounds=rounds, budget=float("inf")
        )
    counted = counted[-len(times["ticks"].wall) :]  # without those that warmed up
    alone_seconds, on_cpu = times["network"].wall, device.type == "cpu"
    each_tick = [seconds / count for count, seconds, _ in counted]
    return {
        "rows": rows,
        "ticks": [count for count, _, _ in counted],
        "tick_ms": 1e3 * statistics.median(each_tick),
        "network_ms": 1e3 * statistics.median(alone_seconds),
        "tick_over_network": [a / b for a, b in zip(each_tick, alone_seconds, strict=True)],
        "whole_over_network": [a / b for a, b in zip(times["ticks"].wall, alone_seconds, strict=True)],
        # Of the host's clock, which on a GPU does not wait for the network.
        "outside_shares": [1 - inside / seconds for _, seconds, inside in counted] if on_cpu else None,
        "outside_ms": 1e3 * statistics.median((s - inside) / n for n, s, inside in counted) if on_cpu else None,
    }


def _alone(
    network: nn.Module, shape: tuple[int, ...], classes: int, rows: int, device: torch.device, times: int
) -> Callable[[], Any]:
    x, sigma = torch.randn(rows, *shape, device=device), torch.ones(rows, device=device)
    labels = nn.functional.one_hot(torch.arange(rows) % classes, classes).float().to(device) if classes else None

    def run() -> Any:
        with torch.no_grad():
            return network(x, sigma) if labels is None else network(x, sigma, labels)

    if device.type == "cpu":
        return lambda: [run() for _ in range(times)]
    replay = graphed(lambda: image_of(run()))
    return lambda: (*(replay() for _ in range(times)), torch.cuda.synchronize(device))
