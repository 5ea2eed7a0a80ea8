"""`amed sample`: images from seeds."""

from __future__ import annotations

from collections.abc import Iterator

import click

import amed_engine
from amed_engine.cli.network import network_options, no_verify
from amed_engine.cli.options import (
    check_png,
    check_writable,
    drawing_options,
    make_sampler,
    sampler_options,
)


@click.command()
@network_options()
@no_verify
@click.option("--seeds", default="0-63", help="One sample each, e.g. 0-63 or 1,5,9.")
@sampler_options
@drawing_options
@click.option("--out", type=click.Path(dir_okay=False), help="Write all samples as one PNG.")
@click.option("--outdir", type=click.Path(file_okay=False), help="Write a PNG per seed, 000042.png, to a folder.")
@click.option("--subdirs", is_flag=True, help="With --outdir: a folder per thousand seeds.")
def sample(seeds, class_labels, guidance_scale, batch, out, outdir, subdirs, **asked) -> None:
    """Draw samples and save them as PNG."""
    if not (out or outdir):
        raise click.UsageError("nowhere to write; pass --out FILE.png or --outdir FOLDER")
    if subdirs and not outdir:
        raise click.UsageError("--subdirs needs --outdir")
    check_png(out)
    from amed_engine.engine import images
    from amed_engine.engine.seeds import parse_seeds

    numbers = parse_seeds(seeds)
    sampler = make_sampler(**asked)
    images.check_pictures(sampler.model.shape)
    check_writable(out, outdir and images.seed_path(outdir, 0, False))
    pictures, seconds = [], 0.0
    for result in _drawn(sampler, numbers, batch, class_labels, guidance_scale):
        seconds += result.seconds
        done = list(images.to_uint8(result.images))
        if outdir:
            images.save_each(outdir, done, result.seeds or (), subdirs)
        if out:
            pictures.extend(done)
    if out:
        images.save_grid(out, pictures)
    click.echo(result.plan.describe())
    click.echo(f"{len(numbers)} images, NFE {result.nfe}, {seconds:.2f} s, {len(numbers) / seconds:.1f} images/s")
    click.echo(f"backend {result.backend} on {sampler.device}")
    click.echo(f"wrote {' and '.join(filter(None, (out, outdir)))}")


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
