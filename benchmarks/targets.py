"""What the engine is held to, read out of measured rows; a target that is missed is published like one that is met."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Cases = dict[str, dict[str, dict[str, Any]]]  # case -> contestant -> row
INTERVALS = 3  # of a sample at 5 evaluations: the predictor runs once in each


class Target(NamedTuple):
    """One figure and its bound: at most `limit`, or at least."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def describe(self) -> str:
        bound = f"at {'least' if self.at_least else 'most'} {self.limit:g}"
        return f"{self.what}: {self.value:.4g}, {bound}: {'met' if self.met else 'missed'}"

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "met": self.met}


def judged(kernels: Cases, samples: Cases) -> list[Target]:
    """Every target for which there are numbers."""
    return [*_sampling(samples), *_kernels(kernels), *_predictor(kernels, samples)]


def judged_ticks(sizes: Iterable[dict[str, Any]], *, on_gpu: bool) -> Iterator[Target]:
    """Of ticks of one bucket each, as `serving_engines.overhead` measures them."""
    for size in sizes:
        if on_gpu and size["rows"] in (8, 64):
            ratio = statistics.median(size["tick_over_network"])
            yield Target(
                f"tick over the network alone, {size['rows']} rows", ratio, 1.10 if size["rows"] == 8 else 1.03
            )
        if size["outside_shares"] and size["rows"] == 16:
            share = statistics.median(size["outside_shares"])
            yield Target("share of a tick outside the network, 16 rows", share, 0.08)


def _sampling(samples: Cases) -> Iterator[Target]:
    for case, rows in samples.items():
        batch = int(case.rpartition("-")[2])
        engine, plain = rows.get("engine fp32", {}), rows.get("plain loop", {})
        if "outside_share" in engine and case == "digits-64":
            yield Target("share of the time outside the denoiser, digits-64 on the CPU", engine["outside_share"], 0.03)
        if engine.get("event_ms") and "overhead" in engine and (batch == 1 or batch >= 64):
            yield Target(f"overhead, {case}", engine["overhead"], 1.02 if batch == 1 else 1.01)
        if engine.get("event_ms") and case in ("cifar10-1", "cifar10-64"):
            yield from _faster(case, rows, plain, 5.0 if batch == 1 else 2.0)


def _faster(case: str, rows: dict[str, dict], plain: dict, limit: float) -> Iterator[Target]:
    ours = {name: row["seconds"] for name, row in rows.items() if name.startswith("engine") and "seconds" in row}
    best = min(ours, key=ours.__getitem__)
    if "seconds" in plain:
        yield Target(f"times faster than the plain loop, {case}, {best}", plain["seconds"] / ours[best], limit, True)
    rival, compiled = rows.get("plain loop, compiled denoiser", {}), "engine fp32 compiled"
    if case.endswith("-1") and "seconds" in rival and compiled in ours:
        ratio = rival["seconds"] / ours[compiled]
        yield Target(f"times faster than the plain loop with a compiled denoiser, {case}, {compiled}", ratio, 1.3, True)


def _kernels(kernels: Cases) -> Iterator[Target]:
    for case, rows in kernels.items():
        native, triton = rows.get("amed native", {}), rows.get("amed triton", {})
        if case.startswith("combine") and case.endswith("64x3x64x64") and "over_unfused" in native:
            yield Target(f"times faster than unfused torch, {case} on the CPU", native["over_unfused"], 1.5, True)
        if "of_copy" in triton and triton["bytes"] >= 256e6:
            yield Target(f"share of a copy's bandwidth, {case}", triton["of_copy"], 0.9, True)


def _predictor(kernels: Cases, samples: Cases) -> Iterator[Target]:
    for batch in (1, 64):
        kernel = kernels.get(f"midpoint-predictor-{batch}x256x8x8", {}).get("amed triton", {})
        sample = samples.get(f"cifar10-{batch}", {}).get("engine fp32", {})
        if "seconds" in kernel and "seconds" in sample:
            share = INTERVALS * kernel["seconds"] / sample["seconds"]
            yield Target(f"the predictor's share of a sample, cifar10-{batch}", share, 0.01)
