"""Shards written beside the sampling: batches come through a bounded queue, a thread encodes them, and a shard that is full
gets its place in the ledger and its name."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amed_engine.datasets.claims import Claim
from amed_engine.datasets.job import Job
from amed_engine.datasets.ledger import Entry, Ledger
from amed_engine.datasets.progress import Progress
from amed_engine.datasets.samples import Samples
from amed_engine.errors import AmedError, ConfigError
from amed_engine.solvers.temporary import Temporary, remove

DEPTH = 4  # batches between the sampler and the writer
MODULUS = 1 << 256


def sum_of(samples: Samples) -> int:
    """The sum mod 2^256 of SHA-256(seed, label, SHA-256 of the sample): of a set of samples, whatever their order, shards and
    file format."""
    labels: Sequence[Any] = [None] * len(samples.seeds) if samples.labels is None else samples.labels.tolist()
    rows = zip(samples.seeds, labels, samples.hashes(), strict=True)
    texts = (f"{seed} {label} {sha256}" for seed, label, sha256 in rows)
    return sum(int.from_bytes(hashlib.sha256(text.encode()).digest()) for text in texts) % MODULUS


def hash_of(path: Path) -> str:
    """SHA-256 of a file; of a folder, of the names and SHA-256s of its files."""
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = (f"{name} {hash_of(path / name)}\n" for name in sizes_of(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sizes_of(path: Path) -> dict[str, int]:
    """Bytes of every file in a folder, by its name from there."""
    files = sorted(file for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
    return {file.relative_to(path).as_posix(): file.lstat().st_size for file in files}


def delete(folder: Path, entry: Entry) -> int:
    """Remove a shard, no file but those that the ledger lists; how many. Raises AmedError where there are others."""
    path = folder / entry.name
    if path.is_symlink() or (entry.files is None and path.is_dir()):
        raise AmedError(f"{path} is no shard of this dataset any more; move it away")
    if entry.files is None or not path.is_dir():
        there = path.exists()
        path.unlink(missing_ok=True)
        return int(there)
    files = sizes_of(path).keys()
    if others := sorted(files - entry.files.keys()):
        raise AmedError(f"{path} holds {others[0]}, which is not of this dataset ({len(others)} such); move it away")
    remove(path)
    return len(files)


@dataclass
class Open:
    """A shard that is being written."""

    shard: int
    claim: Claim
    temporary: Temporary
    writer: Any
    samples: int = 0
    sum: int = 0


class ShardWriter:
    """Writes shards of a job in a thread: `open`, `add` batch by batch, `close`; `finish` waits for the last.

    As a context it gives up what is open when an error comes through. An error of the thread is raised by the next call.
    """

    def __init__(self, job: Job, ledger: Ledger, device: str, progress: Progress):
        self.job, self.ledger, self.device, self.progress = job, ledger, device, progress
        self.error: BaseException | None = None
        self._open: Open | None = None
        self._given_up = threading.Event()
        self._queue: queue.Queue[tuple[Callable[..., None], tuple] | None] = queue.Queue(DEPTH)
        self._thread = threading.Thread(target=self._work, daemon=True, name="amed shard writer")
        self._thread.start()

    def open(self, shard: int, claim: Claim) -> None:
        """The claim is released with the shard's end, whichever it is."""
        try:
            self._put(self._start, shard, claim)
        except BaseException:  # an earlier shard's error, or an interrupt
            claim.release()
            raise

    def add(self, samples: Samples) -> None:
        self._put(self._encode, samples)

    def close(self) -> None:
        self._put(self._end)

    def finish(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
            return
        self._given_up.set()
        self._queue.put(None)
        self._thread.join()

    def _put(self, work: Callable[..., None], *arguments: Any) -> None:
        self._raise()
        self._queue.put((work, arguments))

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            work, arguments = item
            if self.error is None and not self._given_up.is_set():
                try:
                    work(*arguments)
                except BaseException as error:
                    self.error = error
                    self._give_up()
            elif work == self._start:
                arguments[1].release()
        self._give_up()

    def _give_up(self) -> None:
        """Of a shard that has its name nothing is left to give up but the claim."""
        if self._open is not None:
            if self._open.writer is not None:
                self._open.writer.abort()
            self._open.temporary.discard()
            self._open.claim.release()
            self._open = None

    def _start(self, shard: int, claim: Claim) -> None:
        target = self.ledger.folder / self.job.name(shard)
        try:
            self._make_room(shard, target)
            with _naming(target):
                temporary = Temporary(target, folder=self.job.kind.folder)
        except BaseException:
            claim.release()
            raise
        self._open = Open(shard, claim, temporary, None)
        rows = len(self.job.rows(shard))
        self._open.writer = self.job.kind.open(temporary.path, rows, self.job.shape, self.job.stored, self.job.about)

    def _make_room(self, shard: int, target: Path) -> None:
        if not (target.exists() or target.is_symlink()):
            return
        if (entry := self.ledger.refresh().get(shard)) is None:
            raise ConfigError(
                f"{target} is there and not in the ledger: it is not of this dataset, or its line was lost; move it away"
            )
        delete(self.ledger.folder, entry)

    def _encode(self, samples: Samples) -> None:
        assert self._open is not None
        started = time.perf_counter()
        with _naming(self._open.temporary.target):
            self._open.writer.add(samples)
        self._open.samples += len(samples.seeds)
        self._open.sum += sum_of(samples)
        self._open.temporary.beat()
        self.progress.wrote(len(samples.seeds), time.perf_counter() - started)

    def _end(self) -> None:
        assert self._open is not None
        made, started = self._open, time.perf_counter()
        with _naming(made.temporary.target):
            made.writer.close()
            made.writer = None
            made.temporary.flush()
            others = self.ledger.refresh().get(made.shard)  # who took the claim for left, and may have been first
            if others is None or not others.is_there(self.ledger.folder):
                self.ledger.append(self._entry(made))
                made.temporary.publish()
        self._give_up()
        self.progress.wrote(0, time.perf_counter() - started)
        self.progress.published(made.samples)

    def _entry(self, made: Open) -> Entry:
        path = made.temporary.path
        files = sizes_of(path) if self.job.kind.folder else None
        return Entry(
            shard=made.shard,
            name=made.temporary.target.name,
            samples=made.samples,
            sha256=hash_of(path),
            sum=f"{made.sum % MODULUS:064x}",
            size=path.stat().st_size if files is None else sum(files.values()),
            device=self.device,
            files=files,
        )


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """An OSError names the shard, whatever library met it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
