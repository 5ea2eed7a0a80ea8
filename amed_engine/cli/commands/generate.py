"""`amed generate`: a dataset of samples, by any number of processes, each sample exactly once."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import click

from amed_engine.cli.console import Interrupted
from amed_engine.cli.labels import parse_labels
from amed_engine.cli.network import LABEL_KINDS, TOLD, facts_options, no_verify, opened
from amed_engine.cli.options import (
    check_writable,
    check_writable_folder,
    condition_options,
    given_beside,
    make_sampler,
    options,
    range_options,
    sampler_options,
    show,
    where_options,
)

FORMATS = ("png", "npz", "webdataset", "parquet", "arrow", "zarr")


# Options beside --package, in whose file all others are fixed.
PACKAGED = {"package", "class_labels", "labels", "verify", "seeds", "out", "file_format", "shard", "batch", "store"}
PACKAGED |= {"workers", "threads", "again", "check", "overwrite", "json_file"}


@click.command()
@options(where_options, facts_options, range_options)
@click.option(
    "--labels",
    help="A file with the class of each sample, or its numbers, a line per seed; or what a raw network is told of classes: "
    f"{', '.join(LABEL_KINDS)}.",
    show_default="drawn by each seed",
)
@no_verify
@click.option(
    "--package",
    type=click.Path(exists=True, dir_okay=False),
    help="Draw by the loop in a file of amed export, in place of a model; a compiled .pt2 is a program that runs.",
)
@click.option("--seeds", required=True, help="One sample each, e.g. 0-49999 or 1,5,9.")
@sampler_options
@condition_options
@click.option("--out", required=True, type=click.Path(), help="Folder of the dataset; the same command continues it.")
@click.option("--format", "file_format", type=click.Choice(FORMATS), default="png", help="Of the shards.")
@click.option("--shard", type=click.IntRange(min=1), default=1000, help="Samples in each file; png, zarr: folder.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Samples computed at once, always as many.",
    show_default="the largest up to 64 that divides the shard",
)
@click.option(
    "--store", type=click.Choice(["uint8", "float32", "float16"]), show_default="uint8 for pictures, else float32"
)
@click.option("--workers", type=click.IntRange(min=1), default=1, help="Processes on this machine.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Of torch on a CPU, in each worker.")
@click.option(
    "--verify", "again", type=click.IntRange(min=0), default=0, help="Draw so many samples again and compare."
)
@click.option("--check", is_flag=True, help="Compare what is there with its hashes, not with its sizes alone.")
@click.option("--overwrite", is_flag=True, help="Remove the dataset in the folder first, no other file.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the numbers.")
def generate(
    seeds,
    class_labels,
    labels,
    guidance_scale,
    package,
    out,
    file_format,
    batch,
    store,
    workers,
    again,
    overwrite,
    json_file,
    **asked,
) -> None:
    """Draw a dataset: shards of samples, each there whole or not at all."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    if overwrite or workers > 1:
        _check_alone(overwrite)
    check_writable(None if json_file == "-" else json_file, streams=True)
    check_writable_folder(out, "manifest.json", "ledger.jsonl")
    told = {name: asked.pop(name) for name in TOLD if name != "labels"}
    told["labels"], class_labels = _split(labels, class_labels)
    kinds = [] if told["labels"] is None else [f"--labels {labels}"]
    if package is not None and (fixed := given_beside(PACKAGED) + kinds):
        raise click.UsageError(f"--package holds model, plan and device; leave {', '.join(fixed)} out")
    drawing = {name: asked.pop(name) for name in ("shard", "threads", "check")}
    from amed_engine.datasets.generate import generate_dataset
    from amed_engine.datasets.job import fitting_batch
    from amed_engine.datasets.seeds import Seeds

    numbers = Seeds.of(seeds)
    if labels is not None and class_labels is not None and len(class_labels) != len(numbers):
        raise click.UsageError(
            f"{labels} has {len(class_labels)} lines with labels and --seeds names {len(numbers)}; write a line for each seed"
        )
    batch = batch or fitting_batch(min(drawing["shard"], len(numbers)))
    asked["batch_sizes"] = (batch,)  # what a GPU captures
    first = os.environ.get("RANK", "0") == "0"
    try:
        report = generate_dataset(
            functools.partial(_sampler, told, asked)
            if package is None
            else functools.partial(_package, package, asked),
            numbers,
            out,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            format=file_format,
            batch=batch,
            stored=store,
            workers=workers,
            verify=again if first else 0,
            overwrite=overwrite,
            progress=first,
            **drawing,
        )
    except KeyboardInterrupt as error:  # the second one
        raise Interrupted(f"interrupted at once: what is finished stays in {out}; the same command goes on") from error
    show(report, json_file)
    if report.interrupted:
        others = "; the same command draws the others" if report.samples < report.wanted else ""
        raise Interrupted(f"interrupted: {report.samples:,} of {report.wanted:,} samples are in {out}{others}")


def _sampler(told: dict[str, Any], asked: dict[str, Any]) -> Any:
    """In each worker."""
    asked = dict(asked)
    model, weights = opened(asked.pop("model"), asked.pop("weights"), verify=asked["verify"], **told)
    return make_sampler(model, weights=weights, **asked)


def _package(path: str, asked: dict[str, Any]) -> Any:
    """In each worker."""
    from amed_engine.engine.export.package import load_package

    return load_package(path, verify=asked["verify"])


def _split(labels: str | None, class_labels: Any) -> tuple[str | None, Any]:
    """--labels as the kind that a raw network is told, and the labels in a file. Raises click.UsageError."""
    if labels is None or labels in LABEL_KINDS:
        return labels, class_labels
    context = click.get_current_context()
    if class_labels is not None:
        raise click.UsageError("--class and --labels FILE exclude each other; leave one of them out")
    if not Path(labels).is_file():
        raise click.UsageError(f"--labels is a file, or one of {', '.join(LABEL_KINDS)}; {labels!r} is no file")
    option = next(param for param in context.command.params if param.name == "labels")
    return None, parse_labels(context, option, labels)


def _follow(parent: int) -> None:
    """Finish the open shard and end where torchrun was killed: it tells nobody then."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _check_alone(overwrite: bool) -> None:
    """Raise click.UsageError under torchrun, where each process would do it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        what = (
            "--overwrite: remove the dataset before, by one process" if overwrite else "--workers: torchrun starts them"
        )
        raise click.UsageError(f"under torchrun there is no {what}; leave it out")
