"""`generate_dataset`: samples by the hundred thousand, each exactly once."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amed_engine.datasets.drawing import Missing, draw_missing
from amed_engine.datasets.drawing import threads as torch_threads
from amed_engine.datasets.folder import check_hashes, open_folder, overwrite_folder, tidy
from amed_engine.datasets.interrupts import Interrupts
from amed_engine.datasets.job import Job, decisive, fitting_batch, labels_told, place, whole_number
from amed_engine.datasets.progress import Progress
from amed_engine.datasets.seeds import Seeds
from amed_engine.datasets.shards import MODULUS
from amed_engine.datasets.sources import Source, open_source
from amed_engine.datasets.sources.base import batches_of
from amed_engine.datasets.verify import compare_place, verify_samples
from amed_engine.datasets.workers import draw_in_workers
from amed_engine.errors import AmedError, ConfigError

logger = logging.getLogger("amed_engine")

LOOKED = 20  # batches
MAKERS = (types.FunctionType, types.MethodType, functools.partial)


@dataclass(frozen=True)
class DatasetReport:
    """What a run of `generate_dataset` found and did.

    samples: how many the dataset has now, of `wanted`. drawn: by this run. in_other_hands: shards that other living processes
    are drawing. set_hash: of seeds, labels and bytes of all samples that are there, the same for every format, shard size and
    order. verified: how many of them were drawn again and compared. seconds: of the run; drawing, writing: images a second
    while at it. interrupted: by Ctrl-C or SIGTERM, after the open shard.
    """

    folder: str
    wanted: int
    samples: int
    drawn: int
    in_other_hands: int
    set_hash: str
    verified: int
    seconds: float
    drawing: float
    writing: float
    interrupted: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """For people, a line per fact."""
        held = self.in_other_hands
        others = f", {held} shard{'s are' if held > 1 else ' is'} being drawn by others" if held else ""
        whole = "" if self.samples == self.wanted else " (of what is there so far)"
        again = [f"{self.verified} samples drawn again: the same"] if self.verified else []
        rates = f"drawing {self.drawing:.1f} images/s, writing {self.writing:.1f} images/s"
        return "\n".join(
            [
                f"{self.samples:,} of {self.wanted:,} samples are in {self.folder}, {self.drawn:,} of them new{others}",
                f"{self.seconds:.2f} s, {rates}",
                *again,
                f"set hash {self.set_hash}{whole}",
            ]
        )


def generate_dataset(
    source: Any,
    seeds: str | Iterable[int],
    out: str | os.PathLike,
    *,
    class_labels: Any = None,
    guidance_scale: float | None = None,
    format: str = "png",
    shard: int = 1000,
    batch: int | None = None,
    threads: int = 1,
    workers: int = 1,
    stored: str | None = None,
    overwrite: bool = False,
    check: bool = False,
    verify: int = 0,
    progress: bool = False,
    **options: Any,
) -> DatasetReport:
    """Draw the samples of these seeds into a folder, each exactly once; what is there already stays.

    A sample is its seed: its bytes are the same whatever process, order or restart drew it. Any number of processes may run
    this for the same folder, at once and one after the other; each draws what no other has drawn or is drawing. A shard is
    there whole or not at all.

    source: a `Sampler`, what `load_package` returns, or a pipeline of diffusers; or a function without arguments that makes
        one, which several workers need (one of a module, or a functools.partial of such: each makes its own).
    seeds: EDM's notation, "0-49999", a range, or different integers. out: the folder.
    class_labels, guidance_scale: as of `Sampler.run`; labels one for all or one per seed. options: of a pipeline's call.
    format: png, npz, webdataset, parquet, arrow or zarr. shard: samples in each file (png and zarr: folder).
    batch: samples computed at once, always as many, since the size decides the last bits; None is the largest of at most 64
        that divides the shard.
    threads: of torch on a CPU, in each worker. workers: processes on this machine, this one among them.
    stored: "uint8" for pictures, "float32", "float16"; None is bytes for pictures and float32 for everything else.
    overwrite: remove the dataset in the folder first, no file but those of its ledger. check: compare what is there with its
        hashes, not with its sizes alone; what differs is drawn again. verify: draw so many random samples again at the end and
        compare bytes. progress: a bar, or lines, on stderr.
    Ctrl-C and SIGTERM end the run after the open shard (a second one at once); the report says so.
    Raises ConfigError for another dataset in the folder, with the difference; AmedError for samples that differ from what is
    there; FileFormatError for a damaged folder; OSError, naming the file, where the disk is full; and what sampling raises.
    """
    started, folder = time.perf_counter(), Path(out)
    workers, verify = whole_number("workers", workers, 1), whole_number("verify", verify, 0)
    _check_made(source, workers)
    opened = open_made(source, threads, guidance_scale, stored, options)
    job, labels = make_job(opened, Seeds.of(seeds), class_labels, format, shard, batch, threads)
    if overwrite:
        overwrite_folder(folder)
    here = place(opened.identity, opened.device)
    with Interrupts(said=progress) as interrupts, open_folder(folder, job, here) as (job, first):
        stop = interrupts.asked.is_set
        if check:
            check_hashes(folder, job, stop)
        compare_place(folder, job, opened, labels, first)
        missing = Missing(folder, job)
        shown = Progress(len(job.seeds), missing.samples, progress)
        try:
            errors = []
            workers = min(workers, len(missing.left()))
            if workers < 2:
                draw_missing(missing, opened, labels, shown, stop)
            else:
                making = functools.partial(open_made, source, threads, guidance_scale, stored, options)
                errors = draw_in_workers(workers, making, missing, opened, labels, shown, interrupts.asked)
        finally:
            shown.close()
            tidy(folder)
        held = in_other_hands(missing)
        check_ended(errors, missing, held, stop())
        verified = verify_samples(folder, job, opened, labels, verify, stop)
    return report_of(missing, shown, started, held, verified, stop())


def in_other_hands(missing: Missing) -> int:
    """How many shards living writers draw, as of now, as is what is there."""
    held = missing.claims.held()
    missing.refresh()
    return len(held.keys() - missing.there)


def report_of(
    missing: Missing, shown: Progress, started: float, held: int, verified: int, interrupted: bool
) -> DatasetReport:
    return DatasetReport(
        folder=str(missing.folder),
        wanted=len(missing.job.seeds),
        samples=missing.samples,
        drawn=shown.done,
        in_other_hands=held,
        set_hash=set_hash(missing),
        verified=verified,
        seconds=time.perf_counter() - started,
        drawing=shown.rate("drawing"),
        writing=shown.rate("writing"),
        interrupted=interrupted,
    )


def make_job(
    source: Source, seeds: Seeds, class_labels: Any, format: str, shard: int, batch: int | None, threads: int
) -> tuple[Job, np.ndarray | None]:
    """The job, and the labels of its samples where they are given. Raises ConfigError."""
    shard = whole_number("shard", shard, 1)
    labels = source.check_labels(class_labels, len(seeds))
    size = fitting_batch(min(shard, len(seeds))) if batch is None else batch
    told = {
        "source": decisive(source.identity),
        "stored": source.stored,
        "shape": source.shape,
        "labels": labels_told(labels),
    }
    job = Job(seeds=seeds, format=format, shard=shard, batch=size, threads=threads, **told)
    job.kind.check(source.shape, source.stored)
    _warn_of_rows(job)
    return job, labels


def _warn_of_rows(job: Job) -> None:
    """Say where seeds contend for the rows of a batch, which takes more runs of the network: see `batches_of`."""
    looked = [job.seeds[rows.start : rows.stop] for rows in itertools.islice(job.batches(0), LOOKED)]
    runs = sum(len(batches_of(seeds, None, job.batch)[0]) for seeds in looked)
    if runs > max(1.5 * len(looked), len(looked) + 1):
        logger.warning(
            "a seed has the row of its remainder by %d, so these seeds take %.1f times the runs of consecutive ones; name "
            "consecutive seeds, or another batch size",
            *(job.batch, runs / len(looked)),
        )


def check_ended(errors: list[str], missing: Missing, held: int, interrupted: bool) -> None:
    """Raise AmedError where a run ended early and left something to draw."""
    lacking = missing.job.shards - len(missing.there) - held
    if lacking > 0 and not interrupted:
        why = errors[0] if errors else "others gave up what they were drawing"
        raise AmedError(
            f"{why}; {lacking} shards are missing, all others are kept: the same call draws what is missing"
        )
    for error in errors:
        logger.warning("%s; %s", error, "the same call draws what is missing" if lacking > 0 else "nothing is missing")


def set_hash(missing: Missing) -> str:
    """The sum of all samples that are there, 64 hexadecimal digits."""
    entries = missing.ledger.entries
    return f"{sum(int(entries[shard].sum, 16) for shard in missing.there) % MODULUS:064x}"


def _check_made(source: Any, workers: int) -> None:
    """Raise ConfigError where workers cannot make the source themselves."""
    if workers > 1 and not isinstance(source, MAKERS):
        raise ConfigError(
            f"{workers} workers need a function that makes the source in each of them, got {type(source).__name__}; pass one "
            "without arguments, defined in a module, that returns it"
        )


def open_made(source: Any, threads: Any, guidance_scale: float | None, stored: str | None, options: dict) -> Source:
    """Open a source, or what a function makes, with so many threads: ONNX Runtime takes their number when it opens a file."""
    with torch_threads(whole_number("threads", threads, 1)):
        made = source() if isinstance(source, MAKERS) else source
    return open_source(made, guidance_scale=guidance_scale, stored=stored, **options)
