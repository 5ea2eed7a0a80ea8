"""`amed fit`: coefficients of a sampler, matched end to end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from amed_engine.cli.labels import in_turn, label_option
from amed_engine.cli.network import network_options, no_verify
from amed_engine.cli.options import check_writable_folder, check_writable_model, first_step_options, open_network


@click.command()
@network_options(checks=False)
@no_verify
@click.option("--variant", default="nonstationary", help="nonstationary, adaptive, constants or epd.")
@click.option("--nfe", default="5", help="Network evaluations per sample: a number, or several such as 3-10 or 3,5.")
@click.option("--solver", default="amed", help="Of constants and epd: amed, or a solver to refine.")
@first_step_options
@label_option
@click.option("--guidance", "guidance_scale", type=float, help="Fit for this guidance.", show_default="none")
@click.option("--samples", type=int, default=512, help="Latents that the teacher solves.")
@click.option("--batch", type=int, default=64, help="Latents at once.")
@click.option("--starts", type=int, default=2, help="Training-free solvers to start from.")
@click.option("--early", type=int, default=6, help="Iterations from each start, on the first latents.")
@click.option("--late", type=int, default=4, help="Iterations on all latents.")
@click.option("--teacher-nfe", type=int, default=24, help="Evaluations of the teacher.")
@click.option("--seed", type=int, default=0, help="Of latents and labels.")
@click.option(
    "--out", type=click.Path(), required=True, help="A file; for several NFE a folder, of nfe5.safetensors etc."
)
def fit(model, weights, device, nfe, class_labels, out, **options) -> None:
    """Fit a predictor to a model by Gauss-Newton, and save it."""
    import amed_engine
    from amed_engine.engine.seeds import parse_seeds

    numbers, several = parse_seeds(nfe, "NFE"), not nfe.isdecimal()
    if several and Path(out).suffix == ".safetensors":
        raise click.UsageError(f"several NFE are written to a folder, one file each; pass --out FOLDER, not {out}")
    if several:
        check_writable_folder(out, *(f"nfe{number}.safetensors" for number in numbers))
    else:
        check_writable_model(out)
    network = open_network(model, weights, device)
    options["conditions"] = in_turn(class_labels, network, min(options["batch"], options["samples"]))
    made: Any = amed_engine.fit(network, nfe=numbers, progress=sys.stderr.isatty(), **options)
    for number, predictor in made.items():
        path = Path(out) / f"nfe{number}.safetensors" if several else out
        amed_engine.save_predictor(predictor, path)
        click.echo(f"{predictor.plan.describe() if predictor.plan else number}: wrote {path}")
        click.echo(str(predictor.report))
