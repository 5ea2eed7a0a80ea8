"""Whole samples at 5 network evaluations: this engine, the way published code does it, and what users do instead.

pytest benchmarks/bench_sampler.py --benchmark-only [-m "not gpu"] [--full]
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contestants import Contest
from harness import Unavailable, compete
from plain_loop import NFE
from workloads import WORKLOADS

BATCHES = (1, 8, 64, 256)
Case = tuple[str, int]  # workload, batch


def cases(device: torch.device, *, full: bool = False) -> list[Case]:
    """In order of importance, for when time runs out."""
    if device.type == "cuda":
        first = [("cifar10", 1), ("cifar10", 64), ("digits", 1), ("digits", 64), ("imagenet64", 1), ("imagenet64", 64)]
        real = [name for name in WORKLOADS if not name.startswith("tiny")]
        return first + [case for case in itertools.product(real, BATCHES) if case not in first]
    return [*(("digits", batch) for batch in (64, 8, 1)), *([("cifar10", 1)] if full else [])]


def plan(device: torch.device) -> list[tuple[Case, bool]]:
    """Cases, and whether with compiled contestants, in order of importance; compiling one takes longer than four without."""
    listed = cases(device)
    plain = [(case, False) for case in listed[:6]]
    return [*plain[:4], (listed[0], True), *plain[4:], *((case, True) for case in listed[1:])]


def run(
    case: Case, device: torch.device, *, full: bool = False, compiled: bool = True, **options: Any
) -> dict[str, dict[str, Any]]:
    """Rows of all contestants; {"all": {"skipped": reason}} where the network cannot be had.

    full: also what takes minutes. compiled: on a GPU, also what torch.compile makes.
    """
    name, batch = case
    try:
        contest = Contest(WORKLOADS[name], batch, device, full=full, compiled=compiled)
    except Unavailable as reason:
        return {"all": {"skipped": str(reason)}}
    contestants = contest.contestants()
    rows = compete(contestants, device, **options)
    for contestant in contestants:
        floor = rows.get(contestant.floor or "", {})
        _derive(rows[contestant.name], batch, floor.get("seconds"))
    if device.type == "cpu":
        for who, setup in (("plain loop", contest.published), ("engine fp32", contest.engine)):
            if "seconds" in rows[who]:
                times = max(3, min(9, int(20 / rows[who]["seconds"])))
                rows[who]["outside_share"] = statistics.median(contest.outside(setup(), times))
    return rows


def _derive(row: dict[str, Any], batch: int, evaluation: float | None) -> None:
    """What the times mean; evaluation: seconds of the network alone, once, as a replayed graph on a GPU."""
    if "seconds" not in row:
        return
    row["batch"] = batch
    if evaluation is not None:
        row["images/s"] = batch / row["seconds"]
        row["outside_ms"] = (row["seconds"] - NFE * evaluation) * 1e3
        row["overhead"] = row["seconds"] / (NFE * evaluation)


# ---- pytest


ALWAYS = (
    "plain loop",
    "engine fp32",
    "denoiser fp32",
    "diffusers DPM-Solver++ 2M",
    "k-diffusion DPM-Solver++ 2M",
)
COMPILED = ("plain loop, compiled denoiser", "engine fp32 compiled", "compiled loop")
NAMES = {
    "cpu": (*ALWAYS, *COMPILED),
    "cuda": (*ALWAYS, "engine bf16", "denoiser bf16", *COMPILED, "engine bf16 compiled"),
}


def _parameters() -> Iterator[Any]:
    """Contestants of a case one after the other: they are measured together."""
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        for case in cases(device, full=True):
            for name in NAMES[device.type]:
                marks = [pytest.mark.gpu] if device.type == "cuda" else []
                slow = name in COMPILED or (device.type == "cpu" and case[0] == "cifar10")
                marks += [pytest.mark.slow] if slow else []
                yield pytest.param(device, case, name, id=f"{device.type}-{case[0]}-{case[1]}-{name}", marks=marks)


@pytest.mark.parametrize(("device", "case", "contestant"), list(_parameters()))
def test_sample(device, case, contestant, measured, report, request):
    full = request.config.getoption("--full")
    if device.type == "cpu" and not full and (case[0] == "cifar10" or contestant in COMPILED):
        pytest.skip("takes minutes on a CPU; ask with --full")
    rows = measured("samples", device, f"{case[0]}-{case[1]}", lambda: run(case, device, full=full))
    report(f"{device.type} {case[0]} batch {case[1]}", rows, contestant)
