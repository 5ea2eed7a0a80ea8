"""Measures contestants against each other: interleaved rounds in one process, and a record of where it happened."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


class Unavailable(Exception):
    """A contestant cannot run here; the message says why and goes into the results."""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    setup: builds, compiles and warms it up and returns what is timed; raises Unavailable. calls: how often the work is
    done in one measurement; times are divided by it. seconds: what setup may cost, so that it can be left out when time is
    short. tolerance: of its result against `expected`, relative to that one's largest element. floor: the contestant
    whose time is what this one must spend in the network.
    """

    name: str
    setup: Callable[[], Callable[[], Tensor]]
    calls: int = 1
    seconds: float = 0.0
    tolerance: float | None = 1e-3
    expected: Callable[[], Tensor] | None = None
    floor: str | None = None


class HostClock:
    """Wall time only."""

    def time(self, work: Callable[[], Any]) -> tuple[float, float | None, float]:
        """Seconds until the result was there, of the device's own clock, and until the call returned."""
        start = time.perf_counter()
        work()
        wall = time.perf_counter() - start
        return wall, None, wall


class CudaClock:
    """Wall time and CUDA events of the same call, with one synchronize: that of the closing event."""

    def __init__(self):
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(self, work: Callable[[], Any]) -> tuple[float, float | None, float]:
        first, last = self.events
        start = time.perf_counter()
        first.record()
        work()
        last.record()
        submitted = time.perf_counter() - start
        last.synchronize()
        wall = time.perf_counter() - start
        return wall, first.elapsed_time(last) / 1e3, submitted


def clock_for(device: torch.device) -> HostClock | CudaClock:
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass
class Times:
    """Seconds of every measurement, in the order taken, per call of the work."""

    wall: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)  # empty on the CPU
    submit: list[float] = field(default_factory=list)

    def add(self, measured: tuple[float, float | None, float], calls: int) -> None:
        wall, events, submit = measured
        self.wall.append(wall / calls)
        self.submit.append(submit / calls)
        if events is not None:
            self.events.append(events / calls)

    @property
    def best_guess(self) -> float:
        """The median, of the device's clock where there is one: what ratios are made of."""
        return statistics.median(self.events or self.wall)

    def summary(self) -> dict[str, Any]:
        return {
            "rounds": len(self.wall),
            "wall_ms": spread(self.wall),
            "event_ms": spread(self.events) if self.events else None,
            "submit_ms": statistics.median(self.submit) * 1e3,
            "wall_seconds": self.wall,
        }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, interquartile range, percentiles and minimum in milliseconds."""
    ms = torch.tensor(seconds, dtype=torch.float64) * 1e3
    quarter, median, three_quarters, p90, p99 = torch.quantile(
        ms, torch.tensor([0.25, 0.5, 0.75, 0.9, 0.99], dtype=torch.float64)
    ).tolist()
    iqr = three_quarters - quarter
    return {"median": median, "iqr": iqr, "p50": median, "p90": p90, "p99": p99, "min": ms.min().item()}


ROUNDS_AT_LEAST = 7  # five, after two warm-ups


def measure(
    contestants: dict[str, tuple[Callable[[], Any], int]],
    clock: HostClock | CudaClock,
    *,
    rounds: int = 7,
    warmups: int = 2,
    budget: float = 30.0,
) -> dict[str, Times]:
    """Times of each contestant {name: (work, calls)}, taken in turns: A B C, C B A, A B C, ...

    So a machine that slows down slows all of them down, and none always runs behind the same neighbour. After five
    rounds it stops once `budget` seconds are spent. Raises ValueError for fewer than five rounds or two warm-ups.
    """
    if rounds < 5 or warmups < 2:
        raise ValueError(f"need at least 5 rounds after 2 warm-ups, got {rounds} and {warmups}")
    times = {name: Times() for name in contestants}
    order = list(contestants.items())
    for _ in range(warmups):
        for _, (work, _) in order:
            clock.time(work)
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - started > budget:
            break
        for name, (work, calls) in order:
            times[name].add(clock.time(work), calls)
        order.reverse()
    return times


def difference(result: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest element expected; infinite where anything is not a number."""
    result, expected = result.double(), expected.double()
    ratio = ((result - expected).abs().max() / expected.abs().max()).item()
    return ratio if ratio == ratio else float("inf")


def compete(
    contestants: Sequence[Contestant], device: torch.device, *, time_left: float = float("inf"), **options: Any
) -> dict[str, dict[str, Any]]:
    """Set up, check and measure contestants; one row each, {"skipped": reason} for those that could not take part.

    The first is the one the others are checked against where they bring nothing else to expect; it must be available.
    """
    deadline = time.perf_counter() + time_left
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, tuple[Callable[[], Any], int]] = {}
    reference: Tensor | None = None
    once = 0.0  # seconds of one call of each that is ready, together
    for contestant in contestants:
        row = rows[contestant.name] = {}
        try:
            needed = contestant.seconds + ROUNDS_AT_LEAST * once
            if time.perf_counter() + needed > deadline:
                raise Unavailable(f"it and the measurement may take {needed:.0f} s, and the time is up")
            started = time.perf_counter()
            work = contestant.setup()
            made = time.perf_counter()
            result = work().clone()
            _wait(device)
            row["setup_s"] = time.perf_counter() - started
            once += time.perf_counter() - made
            reference = result if reference is None else reference
            expected = reference if contestant.expected is None else contestant.expected()
            if contestant.tolerance is not None:
                _check(contestant, result, expected, row)
            ready[contestant.name] = (work, contestant.calls)
        except Unavailable as reason:
            row["skipped"] = str(reason)
        except Exception as error:
            # A competitor that breaks is a result too; the others go on.
            row["skipped"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for name, times in measure(ready, clock_for(device), **options).items():
        rows[name] |= times.summary() | {"seconds": times.best_guess}
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check(contestant: Contestant, result: Tensor, expected: Tensor, row: dict[str, Any]) -> None:
    assert contestant.tolerance is not None
    row["difference"], row["tolerance"] = difference(result, expected), contestant.tolerance
    if row["difference"] > contestant.tolerance:
        raise Unavailable(
            f"wrong result: off by {row['difference']:.1e} of the largest element, {contestant.tolerance:.0e} allowed"
        )


class Playback:
    """A timer for pytest-benchmark that tells times which were taken before, so that its report holds them."""

    def __init__(self):
        self.now, self.pending = 0.0, iter(())

    def load(self, seconds: Sequence[float]) -> int:
        """The readings of these durations, one after the other; how many."""
        self.pending = iter([reading for s in seconds for reading in (0.0, s)])
        return len(seconds)

    def __call__(self) -> float:
        self.now += next(self.pending, 1e-9)
        return self.now


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Where numbers were taken, and of which code."""
    cuda = device is not None and device.type == "cuda"
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv")
        if cuda
        else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "tf32": {"matmul": _tf32(torch.backends.cuda.matmul), "convolution": _tf32(torch.backends.cudnn)},
        "python": sys.version.split()[0],
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or os.environ.get("AMED_COMMIT", "unknown"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    status = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return found | {"dirty": None if status is None else bool(status)}


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tf32(backend: Any) -> bool | str:
    try:
        return backend.allow_tf32
    except RuntimeError:  # torch refuses to say where its new and old switches were mixed
        return "mixed"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
