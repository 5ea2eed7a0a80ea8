"""`amed convert`: published checkpoints to this package's files."""

from __future__ import annotations

import json
from typing import Any

import click

from amed_engine.cli.options import check_writable_model


@click.command()
@click.argument("file", type=click.Path(exists=True))
@click.option("--out", type=click.Path(), help="Where to write it.", show_default="beside the original")
@click.option(
    "--weights",
    metavar="NAME",
    help="Of a file with several: ema, model, or the place of one in it.",
    show_default="the averaged ones, where there are any",
)
@click.option(
    "--set", "pairs", multiple=True, metavar="NAME=VALUE", help="What the file does not tell, e.g. image_size=256."
)
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    help="What the contents of the file may have, unpacked.",
    show_default="as many as the file, or 256 MiB where that is more",
)
def convert(file: str, out: str | None, weights: str | None, pairs: tuple[str, ...], max_bytes: int | None) -> None:
    """Convert a published checkpoint: AMED predictor, EDM, guided-diffusion, consistency or latent-diffusion model.

    FILE is a file, the index of shards, or a folder with one of these. Nothing in it is run; what is not plain data is refused
    by name.
    """
    from amed_engine.checkpoints import convert as work

    if out is not None:
        check_writable_model(out)
    done = work(file, out, weights=weights, max_bytes=max_bytes, **dict(map(_parse, pairs)))
    click.echo(done.description)
    click.echo(f"wrote {done.path}")


def _parse(pair: str) -> tuple[str, Any]:
    """name=value, the value read as JSON or else as text."""
    name, _, value = pair.partition("=")
    if not (name.isidentifier() and value):
        raise click.BadParameter(f"{pair!r} is not name=value; write e.g. image_size=256", param_hint="--set")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
