"""`amed calibrate`: the best training-free plan for a model, as a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from amed_engine.cli.labels import in_turn, label_option
from amed_engine.cli.network import network_options, no_verify
from amed_engine.cli.options import check_writable, check_writable_folder, open_network


@click.command()
@network_options(checks=False)
@no_verify
@click.option("--nfe", default="5", help="Network evaluations per sample: a number, or several such as 3-10 or 3,5.")
@label_option
@click.option("--guidance", "guidance_scale", type=float, help="Calibrate for this guidance.", show_default="none")
@click.option("--batch", type=int, default=64, help="Samples computed at once, of 64.")
@click.option("--rows", type=click.IntRange(min=1), help="Plans of the table, the best.", show_default="all")
@click.option("--out", type=click.Path(), required=True, help="A file; for several NFE a folder, of nfe5.json etc.")
def calibrate(model, weights, device, nfe, class_labels, batch, rows, out, **options) -> None:
    """Find the best solver, schedule and first step of a model, and save them for --plan.

    It takes up to 10,000 network evaluations for each NFE: on a CPU minutes for a small network, hours for a large one.
    """
    import amed_engine
    from amed_engine.engine.seeds import parse_seeds

    numbers, several = parse_seeds(nfe, "NFE"), not nfe.isdecimal()
    if several and Path(out).suffix == ".json":
        raise click.UsageError(f"several NFE are written to a folder, one file each; pass --out FOLDER, not {out}")
    if several:
        check_writable_folder(out, *(f"nfe{number}.json" for number in numbers))
    else:
        check_writable(out, streams=True)
    network = open_network(model, weights, device)
    conditions = in_turn(class_labels, network, batch)
    asked = {"conditions": conditions, "batch": batch, "progress": sys.stderr.isatty(), **options}
    found: Any = amed_engine.calibrate(network, numbers, **asked)
    for number, calibration in found.items():
        path = Path(out) / f"nfe{number}.json" if several else out
        calibration.plan.save(path)
        click.echo(calibration.table(rows))
        click.echo(f"{calibration.plan.describe()}: wrote {path}")
