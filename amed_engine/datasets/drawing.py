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
from amed_engine.solvers.temporary import sweep

Stop = Callable[[], bool]


class Missing:
    """Shards of a folder that nobody has drawn or draws; those that are there are looked at once. run: see `Claims`."""

    def __init__(self, folder: Path, job: Job, run: str | None = None):
        self.folder, self.job = folder, job
        self.ledger, self.claims = Ledger(folder), Claims(folder, run)
        self.there: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        for shard, entry in self.ledger.refresh().items():
            if shard not in self.there and shard < self.job.shards and entry.is_there(self.folder):
                self.there.add(shard)

    def tidy(self) -> None:
        """Remove what killed writers left."""
        sweep(self.folder)
        self.claims.tidy()

    @property
    def samples(self) -> int:
        """How many are there."""
        return sum(len(self.job.rows(shard)) for shard in self.there)

    def claimed(self, stop: Stop) -> Iterator[tuple[int, Claim]]:
        """One after the other, claimed for this process, until there are none or `stop` says so."""
        taken = True
        while taken:  # once more after a round that had some: others may have left theirs meanwhile
            taken = False
            for shard in range(self.job.shards):
                if stop():
                    return
                if shard not in self.there and (claim := self.claim(shard)) is not None:
                    taken = True
                    yield shard, claim

    def claim(self, shard: int) -> Claim | None:
        """A shard's claim; None where another draws it, and where it is `there` by now."""
        claim = self.claims.take(shard)
        if claim is None:
            return None
        self.refresh()  # it may have been finished since the last look
        if shard in self.there:
            claim.release()
            return None
        return claim


def rows_of(job: Job, rows: range, labels: np.ndarray | None, source: Source) -> Samples:
    """The samples at these places, in a batch of the job's size, since that decides last bits."""
    places = slice(rows.start, rows.stop)
    return source.draw(job.seeds[places], None if labels is None else labels[places], job.batch)


def draw_missing(
    folder: Path, job: Job, source: Source, labels: np.ndarray | None, progress: Progress, stop: Stop
) -> None:
    """Draw what nobody else does, until nothing is left or `stop` says so between shards.

    Raises what sampling and writing raise; the open shard is given up then, and all others are kept.
    """
    missing = Missing(folder, job)
    with threads(job.threads), ShardWriter(job, Ledger(folder), source.device, progress) as writer:
        writer.ledger.refresh()
        for shard, claim in missing.claimed(stop):
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
