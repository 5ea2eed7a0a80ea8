"""One process drawing what a dataset lacks, shard by shard, beside any number of others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from amed_engine.datasets.claims import Claim, Claims
from amed_engine.datasets.job import Job
from amed_engine.datasets.ledger import Ledger
from amed_engine.datasets.progress import Progress
from amed_engine.datasets.samples import Samples
from amed_engine.datasets.shards import ShardWriter
from amed_engine.datasets.sources import Source

Stop = Callable[[], bool]


class Missing:
    """Shards of a folder that nobody has drawn or draws; those that are there are looked at once. run: see `Claims`."""

    def __init__(self, folder: Path, job: Job, run: str | None = None):
        self.folder, self.job = folder, job
        self.ledger, self.claims = Ledger(folder), Claims(folder, run)
        self.there: set[int] = set()
        self.samples = 0
        self.refresh()

    def refresh(self) -> None:
        """Look again at all of those that were not there."""
        for shard in list(self.ledger.refresh()):
            self._look(shard)

    def finished(self, shard: int) -> bool:
        """Whether it is there by now: what others added to the ledger is read, and this shard alone looked at."""
        self.ledger.refresh()
        return self._look(shard)

    def _look(self, shard: int) -> bool:
        entry = self.ledger.entries.get(shard)
        if entry is not None and shard not in self.there and shard < self.job.shards and entry.is_there(self.folder):
            self.there.add(shard)
            self.samples += len(self.job.rows(shard))
        return shard in self.there

    def claimed(self, stop: Stop) -> Iterator[tuple[int, Claim]]:
        """One after the other, claimed for this process, until there are none or `stop` says so."""
        while left := self.left():  # once more after a round: others may have given up theirs meanwhile
            for shard in left:
                if stop():
                    return
                if (claim := self.claim(shard)) is not None:
                    yield shard, claim

    def left(self) -> list[int]:
        """Those that are neither there nor in the hands of a living writer."""
        held = self.claims.held()  # first: what is finished after this look is there at the next
        self.refresh()
        return [shard for shard in range(self.job.shards) if shard not in self.there and shard not in held]

    def claim(self, shard: int) -> Claim | None:
        """A shard's claim; None where another draws it, and where it is `there` by now."""
        if self.finished(shard) or (claim := self.claims.take(shard)) is None:
            return None
        with contextlib.ExitStack() as unless:
            unless.callback(claim.release)
            if self.finished(shard):  # between the two
                return None
            unless.pop_all()
        return claim


def rows_of(job: Job, rows: range, labels: np.ndarray | None, source: Source) -> Samples:
    """The samples at these places, in a batch of the job's size, since that decides last bits."""
    places = slice(rows.start, rows.stop)
    return source.draw(job.seeds[places], None if labels is None else labels[places], job.batch)


def draw_missing(missing: Missing, source: Source, labels: np.ndarray | None, progress: Progress, stop: Stop) -> None:
    """Draw what nobody else does, until nothing is left or `stop` says so between shards.

    Raises what sampling and writing raise; the open shard is given up then, and all others are kept.
    """
    job, ledger = missing.job, Ledger(missing.folder)  # the writer's thread has its own
    with threads(job.threads), ShardWriter(job, ledger, source.device, progress) as writer:
        for shard, claim in missing.claimed(stop):
            progress.found(missing.samples)
            draw_shard(shard, claim, source, labels, writer)


def draw_shard(shard: int, claim: Claim, source: Source, labels: np.ndarray | None, writer: ShardWriter) -> None:
    """Draw a claimed shard batch by batch; it has its name once the writer has finished."""
    writer.open(shard, claim)
    for rows in writer.job.batches(shard):
        started = time.perf_counter()
        samples = rows_of(writer.job, rows, labels, source)
        writer.progress.drew(len(rows), time.perf_counter() - started)
        writer.add(samples)
    writer.close()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """With so many threads of torch: their number decides last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
