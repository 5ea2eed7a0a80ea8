"""Datasets drawn by processes that are watched, killed and looked through."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amed_engine.datasets.job import load_manifest
from amed_engine.datasets.ledger import Ledger
from amed_engine.datasets.shards import hash_of

KINDS = ("process", "workers", "torchrun", "ray")
HERE = Path(__file__).resolve().parent
EVERY = 0.05  # seconds between looks at the processes
PATIENCE = 120.0  # seconds for processes whose parent was killed


@dataclass(frozen=True)
class Wanted:
    """A dataset of the bundled digits."""

    samples: int
    nfe: int = 5
    format: str = "npz"
    shard: int = 1000

    @property
    def arguments(self) -> list[str]:
        told = {"model": "digits", "nfe": self.nfe, "seeds": f"0-{self.samples - 1}"}
        told |= {"format": self.format, "shard": self.shard}
        return ["generate", *(word for name, value in told.items() for word in (f"--{name}", str(value)))]

    def command(self, kind: str, folder: Path) -> list[str]:
        """What draws it into a folder; each of two workers, ranks or actors has one thread."""
        arguments = [*self.arguments, "--out", str(folder)]
        python = [sys.executable, "-P"]
        if kind == "ray":
            return [
                *python,
                str(HERE / "dataset_ray.py"),
                *map(str, (self.samples, self.nfe, self.format, self.shard, folder)),
            ]
        if kind == "torchrun":
            return [*python, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "amed_engine", *arguments]
        return [*python, "-m", "amed_engine", *arguments, *(["--workers", "2"] if kind == "workers" else [])]


@dataclass
class Watched:
    """A running command. peaks: the most resident memory, in MiB, of each of its processes, as far as seen."""

    command: list[str]
    log: Path
    peaks: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with open(self.log, "ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(self.command, cwd="/", stdout=log, stderr=log, env=environment)

    def look(self) -> list[int]:
        """Its living processes, itself first."""
        if self.process.poll() is not None:
            return []
        found = [self.process.pid]
        for pid in found:
            found.extend(_children(pid))
            if (peak := _peak(pid)) is not None:
                self.peaks[pid] = peak
        return found

    def wait(self, seconds: float = float("inf")) -> bool:
        """Watch it for so long; whether it ended."""
        ends = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < ends:
            self.look()
            time.sleep(EVERY)
        return self.process.poll() is not None

    def kill_one(self, chance: random.Random) -> str | None:
        """SIGKILL to one of those that draw or lead; which it was, None where all have ended."""
        victims = {pid: role for pid in self.look() if (role := _role(pid, self.process.pid))}
        if not victims:
            return None
        pid = chance.choice(list(victims))
        os.kill(pid, signal.SIGKILL)
        return victims[pid]

    def settle(self) -> None:
        """Wait for what a killed parent left; raise TimeoutError for what stays."""
        self.process.wait()
        ends = time.monotonic() + PATIENCE
        while left := [pid for pid in self.peaks if _role(pid, self.process.pid)]:
            if time.monotonic() > ends:
                raise TimeoutError(f"processes {left} of {self.command} still run")
            time.sleep(EVERY)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.extend(map(int, path.read_text().split()))
    return found


def _peak(pid: int) -> float | None:
    """MiB, by the kernel's own high-water mark."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


def _role(pid: int, leader: int) -> str | None:
    """leader, or drawing for a worker, rank or actor; None for helpers of libraries, and for what has ended."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        if pid == leader and words:
            return "leader"
        if "spawn_main" in words or "ray::MapWorker" in words or " generate " in words:
            return "drawing"
    return None


def contents(folder: Path) -> dict[str, Any]:
    """All that can be read in a dataset's folder.

    set: SHA-256 of the sorted lines "seed label SHA-256". twice: seeds in more than one place. half: shards that are not what
    the ledger says. files: names of what is no shard.
    """
    job, _ = load_manifest(folder)
    entries = Ledger(folder).refresh()
    shards = sorted(folder.glob("shard-*"))
    half = [path.name for path in shards if hash_of(path) not in {entry.sha256 for entry in entries.values()}]
    lines = [
        f"{seed} {label} {digest}"
        for path in shards
        for batch in job.kind.read(path, 500)
        for seed, label, digest in zip(batch.seeds, _labels(batch), batch.hashes(), strict=True)
    ]
    seeds = [int(line.split()[0]) for line in lines]
    others = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _within(path, shards)}
    return {
        "samples": len(set(seeds)),
        "twice": len(seeds) - len(set(seeds)),
        "half": half,
        "files": sorted(others),
        "set": hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest(),
    }


def _labels(batch: Any) -> list[Any]:
    return [None] * len(batch.seeds) if batch.labels is None else batch.labels.tolist()


def _within(path: Path, shards: list[Path]) -> bool:
    return any(path == shard or shard in path.parents for shard in shards)
