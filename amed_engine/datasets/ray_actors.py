"""What runs on the nodes of a Ray cluster that draws a dataset."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from amed_engine.datasets.drawing import Missing, draw_shard, threads
from amed_engine.datasets.generate import make_job
from amed_engine.datasets.job import NAME, Job, place
from amed_engine.datasets.progress import Progress
from amed_engine.datasets.shards import ShardWriter
from amed_engine.datasets.sources import Source
from amed_engine.datasets.verify import compare_place, verify_samples
from amed_engine.datasets.workers import check_same, told
from amed_engine.errors import AmedError, ConfigError, require

TRIES = 20  # of a shard: as many actors may die over it

Making = Callable[[], Source]


class Foreman:
    """One actor of a run, whom the others ask before they begin a shard."""

    def __init__(self) -> None:
        self.stopped = False
        self.begun: Counter[int] = Counter()

    def stop(self) -> None:
        """Begin no further shard."""
        self.stopped = True

    def begin(self, shard: int) -> int:
        """How often it was begun, with this time; 0 where it is not to be."""
        if self.stopped:
            return 0
        self.begun[shard] += 1
        return self.begun[shard]


class Drawer:
    """An actor of the pool. Its source is made with its first shard: Ray does not restart what dies in a constructor."""

    def __init__(
        self, making: Making, labels: np.ndarray | None, first: dict[str, Any], missing: Missing, foreman: Any
    ) -> None:
        self.making, self.labels, self.first, self.missing, self.foreman = making, labels, first, missing, foreman
        self.source: Source | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Draw the shard of this number where it is missing. A row: samples and seconds of drawing and writing, an error."""
        progress, said = Progress(0, 0, shown=False), ""
        try:
            self._draw(int(batch["shard"][0]), progress)
        except Exception as error:
            said = f"{told(error)} (on {socket.gethostname()})"
        samples, seconds = progress.samples, progress.seconds
        row = {"drew": samples["drawing"], "drawing": seconds["drawing"]}
        row |= {"wrote": samples["writing"], "writing": seconds["writing"], "error": said}
        return {name: [value] for name, value in row.items()}

    def _draw(self, shard: int, progress: Progress) -> None:
        tried = require("ray", "ray").get(self.foreman.begin.remote(shard))
        if tried > TRIES:
            raise AmedError(f"{TRIES} actors died over shard {shard}: look for what kills them, memory most likely")
        if tried == 0:
            return
        if self.source is None:
            self.source = self._made()
        missing, job = self.missing, self.missing.job
        with threads(job.threads), ShardWriter(job, missing.ledger, self.source.device, progress) as writer:
            if (claim := missing.claim(shard)) is not None:
                draw_shard(shard, claim, self.source, self.labels, writer)

    def _made(self) -> Source:
        missing = self.missing
        if not (missing.folder / NAME).exists():
            raise ConfigError(f"{missing.folder} is not there: it has to be on storage that all nodes share")
        source = self.making()
        check_same(missing.job, source)
        compare_place(missing.folder, missing.job, source, self.labels, self.first)
        return source


def described(making: Making, *arguments: Any) -> tuple[Job, np.ndarray | None, dict[str, Any]]:
    """The job, the labels of its samples, and the place where this runs. arguments: of `make_job`, after the source."""
    source = making()
    job, labels = make_job(source, *arguments)
    return job, labels, place(source.identity, source.device)


def verified(making: Making, folder: Path, job: Job, labels: np.ndarray | None, count: int) -> int:
    """See `verify_samples`."""
    return verify_samples(folder, job, making(), labels, count)
