"""Samples drawn again and compared with what a dataset holds."""

from __future__ import annotations

import bisect
import itertools
import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amed_engine.datasets.drawing import Missing, Stop, rows_of, threads
from amed_engine.datasets.job import Job, place
from amed_engine.datasets.samples import Samples
from amed_engine.datasets.sources import Source
from amed_engine.errors import AmedError, FileFormatError

logger = logging.getLogger("amed_engine")


def verify_samples(
    folder: Path, job: Job, source: Source, labels: np.ndarray | None, count: int, stop: Stop = lambda: False
) -> int:
    """Draw so many random samples of those that are there again, until `stop` says so between batches; how many were compared.

    On the processor they were drawn on they have to have the same bytes, on another to be within one grey level. Raises
    AmedError naming the seeds that differ.
    """
    if not count:
        return 0
    missing = Missing(folder, job)
    chosen = _chosen(missing, count)
    exact = {shard: missing.ledger.entries[shard].device == source.device for shard in missing.there}
    batches = itertools.groupby(chosen, lambda row: (row // job.shard, row % job.shard // job.batch))
    compared = 0
    with threads(job.threads):
        for (shard, number), group in batches:
            if stop():
                break
            start = shard * job.shard + number * job.batch
            rows = range(start, min(start + job.batch, job.rows(shard).stop))
            wanted = [row - start for row in group]
            _compare(folder, job, source, labels, shard, rows, wanted, exact[shard])
            compared += len(wanted)
    if compared and not all(exact.values()):
        logger.warning("some shards were drawn on another processor: compared within one grey level")
    return compared


def _chosen(missing: Missing, count: int) -> list[int]:
    """Places of so many random samples of those that are there, in order."""
    shards = sorted(missing.there)
    ends = list(itertools.accumulate(len(missing.job.rows(shard)) for shard in shards))
    total = ends[-1] if ends else 0
    found = random.SystemRandom().sample(range(total), min(count, total))
    return sorted(missing.job.rows(shards[i])[n - ends[i]] for n in found for i in (bisect.bisect_right(ends, n),))


def compare_place(folder: Path, job: Job, source: Source, labels: np.ndarray | None, first: Mapping[str, Any]) -> None:
    """Where this is another processor or other versions than the dataset was begun with, or its model has no fingerprint,
    compare a batch within one grey level, and say what came of it. Raises AmedError for samples further apart."""
    here = place(source.identity, source.device)
    changed = [f"{name} {first[name]} there, {here[name]} here" for name in here if first[name] != here[name]]
    if not changed and source.identity.get("fingerprint") is not None:
        return
    if not (there := Missing(folder, job).there):
        return
    shard = min(there)
    rows = next(job.batches(shard))
    with threads(job.threads):
        same = _compare(folder, job, source, labels, shard, rows, range(len(rows)), exact=False)
    if changed:
        logger.warning(
            "this dataset was begun elsewhere (%s): a batch drawn again is %s",
            "; ".join(changed),
            "the same to the byte" if same else "within one grey level, not the same to the byte",
        )


def _compare(
    folder: Path,
    job: Job,
    source: Source,
    labels: np.ndarray | None,
    shard: int,
    rows: range,
    wanted: Any,
    exact: bool,
) -> bool:
    """Whether the wanted rows of a batch are the same bytes. Raises AmedError where they are not near enough."""
    kept, drawn = _kept(folder, job, shard, rows), rows_of(job, rows, labels, source)
    same = [row for row in wanted if kept.arrays[row].tobytes() == drawn.arrays[row].tobytes()]
    near = set(same) if exact else {row for row in wanted if _near(kept.arrays[row], drawn.arrays[row])}
    if far := [kept.seeds[row] for row in wanted if row not in near]:
        raise AmedError(
            f"samples of {folder / job.name(shard)} come out otherwise now: seeds {far[:5]}"
            + (f" and {len(far) - 5} more" if len(far) > 5 else "")
            + "; the model or its surroundings have changed: draw into another folder"
        )
    return len(same) == len(wanted)


def _kept(folder: Path, job: Job, shard: int, rows: range) -> Samples:
    """The samples at these places, as the shard has them; its order may be another."""
    wanted = job.seeds[rows.start : rows.stop]
    found: dict[int, np.ndarray] = {}
    for samples in job.kind.read(folder / job.name(shard), job.batch):
        found |= {seed: array for seed, array in zip(samples.seeds, samples.arrays, strict=True) if seed in wanted}
        if len(found) == len(wanted):
            break
    if lacking := [seed for seed in wanted if seed not in found]:
        raise FileFormatError(
            f"{folder / job.name(shard)} lacks the sample of seed {lacking[0]}; remove it, to draw it again"
        )
    return Samples(wanted, np.stack([found[seed] for seed in wanted]))


def _near(kept: np.ndarray, drawn: np.ndarray) -> bool:
    """Within one grey level: 1 of 255, of floats 1/127.5 of the larger of 1 and the largest element."""
    apart = float(np.abs(kept.astype(np.float64) - drawn.astype(np.float64)).max())
    return apart <= (1 if kept.dtype == np.uint8 else max(1.0, float(np.abs(kept).max())) / 127.5)
