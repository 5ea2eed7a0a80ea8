"""`amed sample`: images from seeds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

import amed_engine
from amed_engine.cli.network import network_options, no_verify
from amed_engine.cli.options import (
    check_png,
    check_writable,
    check_writable_folder,
    drawing_options,
    is_stdout,
    make_sampler,
    sampler_options,
    text_to_stderr,
)
from amed_engine.solvers.targets import write_all

STDOUT = 1


@click.command()
@network_options()
@no_verify
@click.option("--seeds", default="0-63", help="One sample each, e.g. 0-63 or 1,5,9.")
@sampler_options
@drawing_options
@click.option(
    "--out",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write all samples as one PNG, or as arrays to an .npz; - for standard output.",
)
@click.option(
    "--format", "kind", type=click.Choice(["png", "npz"]), help="Of --out.", show_default="the name's, or png"
)
@click.option("--outdir", type=click.Path(file_okay=False), help="Write a PNG per seed, 000042.png, to a folder.")
@click.option("--subdirs", is_flag=True, help="With --outdir: a folder per thousand seeds.")
@click.option(
    "--overwrite", is_flag=True, help="With --outdir: replace images of another model, plan, guidance or class."
)
def sample(seeds, class_labels, guidance_scale, batch, out, kind, outdir, subdirs, overwrite, **asked) -> None:
    """Draw samples and save them as PNG, or as arrays.

    Each PNG says in text chunks what it is of; images of something else in --outdir are not replaced.
    """
    kind = _kind(out, kind)
    _check_usage(out, outdir, subdirs, overwrite)
    if is_stdout(out):
        out = "-"
        text_to_stderr()
    from amed_engine.engine import images
    from amed_engine.engine.origin import Origin
    from amed_engine.engine.seeds import check_distinct, parse_seeds

    numbers = parse_seeds(seeds)
    check_distinct(numbers)
    if out and outdir and _is_among(out, [images.seed_path(outdir, seed, subdirs) for seed in numbers]):
        raise click.UsageError(f"--out {out} is the image of a seed in --outdir; choose another name")
    sampler = make_sampler(**asked)
    images.check_pictures(sampler.model.shape)
    check_writable(None if out == "-" else out, streams=True)
    origin = Origin.of(sampler, numbers, class_labels, guidance_scale)
    if outdir:
        check_writable_folder(outdir)
        origin.check(outdir, numbers, subdirs, overwrite)
    pictures, labels, seconds = [], [], 0.0
    for result in _drawn(sampler, numbers, batch, class_labels, guidance_scale):
        seconds += result.seconds
        done, drawn = list(images.to_uint8(result.images)), result.seeds or []
        if outdir:
            notes = origin.notes(drawn, result.labels)
            images.save_each(outdir, done, drawn, subdirs, notes=notes, overwrite=overwrite)
        if out:
            pictures.extend(done)
            labels.append(result.labels)
    if out:
        _write(out, _data(kind, pictures, numbers, _joined(labels), origin.facts))
    click.echo(result.plan.describe())
    click.echo(f"{len(numbers)} images, NFE {result.nfe}, {seconds:.2f} s, {len(numbers) / seconds:.1f} images/s")
    click.echo(f"backend {result.backend} on {sampler.device}")
    click.echo(f"wrote {' and '.join(filter(None, ('standard output' if out == '-' else out, outdir)))}")


def _kind(out: str | None, asked: str | None) -> str:
    """What --out is written as. Raises click.UsageError where its name says another kind."""
    named = "npz" if Path(out or "").suffix.lower() == ".npz" else None
    if asked and out is None:
        raise click.UsageError("--format is of --out; leave it out, images of --outdir are PNG")
    if asked == "npz" and named is None and out != "-" and Path(out or "").suffix:
        raise click.UsageError(
            f"--format npz is written to a name with .npz, got {out}; name it {Path(out or '').stem}.npz"
        )
    if asked == "png" or not named:
        check_png(None if asked == "npz" else out)
    return asked or named or "png"


def _is_among(out: str, paths: list[Path]) -> bool:
    return os.path.realpath(out) in map(os.path.realpath, paths)


def _check_usage(out: str | None, outdir: str | None, subdirs: bool, overwrite: bool) -> None:
    for name, given in (("--out", out), ("--outdir", outdir)):
        if given == "":
            raise click.UsageError(f"{name} is empty, expected a name; give one, or leave it out")
    if not (out or outdir):
        raise click.UsageError("nowhere to write; pass --out FILE.png or --outdir FOLDER")
    for name, given in (("--subdirs", subdirs), ("--overwrite", overwrite)):
        if given and not outdir:
            raise click.UsageError(f"{name} needs --outdir")
    if out == "-" and sys.stdout is None:
        raise click.UsageError("--out - writes to standard output, which is closed; pipe it, or name a file")
    if is_stdout(out) and os.isatty(STDOUT):
        raise click.UsageError("--out - writes bytes, and standard output is a terminal; pipe it, or name a file")


def _data(kind: str, pictures: list[Any], seeds: list[int], labels: Any, facts: Mapping[str, str]) -> bytes:
    from amed_engine.datasets.seeds import Seeds
    from amed_engine.engine import images
    from amed_engine.engine.origin import texts_of

    if kind == "npz":
        return images.npz(pictures, seeds, labels, facts)
    classes = set(texts_of(labels, 1))
    own = {"class": text} if len(classes) == 1 and (text := classes.pop()) else {}
    return images.sheet(pictures, {"seeds": str(Seeds.of(seeds)), **own, **facts})


def _joined(labels: list[Any]) -> Any:
    import torch

    return None if labels[0] is None else torch.cat(labels)


def _write(out: str, data: bytes) -> None:
    from amed_engine.solvers.files import write_or_stream

    if out != "-":
        write_or_stream(out, data)
        return
    try:
        write_all(STDOUT, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _drawn(sampler, seeds, batch, class_labels, guidance_scale) -> Iterator[amed_engine.SampleResult]:
    """Results batch by batch, under a progress bar where stderr is a terminal."""
    from tqdm import tqdm

    from amed_engine.engine.request import check_labels

    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    # Steps count as fractions of an image. Not on a GPU: a callback would keep it from replaying its captured loop.
    stepwise = sampler.device.type == "cpu"
    labels = None if class_labels is None else check_labels(class_labels, sampler.model, len(seeds), look=True)
    with tqdm(total=len(seeds), desc="sample", unit="image", bar_format=form, disable=None) as bar:
        tick = (lambda step: bar.update(len(step.x) / step.steps)) if stepwise else None
        for start in range(0, len(seeds), batch):
            rows = slice(start, start + batch)
            told = None if labels is None else labels[rows]
            result = sampler.run(seeds[rows], told, guidance_scale, callback=tick)
            bar.update(0 if stepwise else len(result.images))
            yield result
