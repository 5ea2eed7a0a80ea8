"""`amed distill`: a predictor trained against a teacher."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

import amed_engine
from amed_engine.cli.network import network_options, no_verify
from amed_engine.cli.options import PAIRS, check_writable_folder, check_writable_model, open_network, plan_options
from amed_engine.solvers import solver_names

_preset: dict[str, Any] = {"show_default": "the preset's"}


@click.command()
@network_options(checks=False)
@no_verify
@click.option("--nfe", type=int, default=5, help="Network evaluations per sample.")
@click.option("--preset", default="amed-solver", help="The paper's settings: amed-solver or amed-plugin.")
@click.option("--solver", help=f"amed, or one to refine: {', '.join(solver_names('optional'))}.", **_preset)
@plan_options
@click.option("--guidance", "guidance_scale", type=float, help="Train for this guidance.", show_default="none")
@click.option("--scale-dir", type=float, help="Half-width of the direction's scale, 0 for none.", **_preset)
@click.option("--scale-time", type=float, help="Half-width of the time's scale, 0 for none.", **_preset)
@click.option("--scales", default="bounded", help="bounded, or wide: exp(s tanh) instead of 1 +- s.")
@click.option("--teacher", help="Solver of the teacher.", **_preset)
@click.option("--teacher-option", "teacher_options", help="Option of the teacher.", **PAIRS)
@click.option("--teacher-intermediate", type=int, help="Its extra noise levels per interval.", **_preset)
@click.option("--objective", default="greedy", help="greedy, or end_to_end through all evaluations.")
@click.option("--learn-sigmas", is_flag=True, help="With end_to_end: train the inner noise levels too.")
@click.option("--kimg", "total_kimg", type=float, help="Thousands of trajectories to train on.", **_preset)
@click.option("--batch", type=int, help="Trajectories at once.", **_preset)
@click.option("--accumulate", type=int, default=1, help="Parts a batch is computed in, to save memory.")
@click.option("--lr", type=float, help="Learning rate of Adam, falling to zero at the end.", **_preset)
@click.option(
    "--out-dir", type=click.Path(file_okay=False), help="Write history, plot and checkpoints; resume from it."
)
@click.option("--seed", type=int, default=0, help="Of weights, latents and labels.")
@click.option("--out", type=click.Path(), required=True, help="Where to save it, e.g. nfe5.safetensors.")
def distill(model, weights, device, out, **options) -> None:
    """Train an AMED predictor for a model and save it."""
    network = open_network(model, weights, device)
    check_writable_model(out)
    if options["out_dir"]:
        check_writable_folder(options["out_dir"])
    given = {name: value for name, value in options.items() if value not in (None, {})}
    rounds: list[Any] = []
    predictor = amed_engine.distill(network, progress=sys.stderr.isatty(), on_round=rounds.append, **given)
    if os.environ.get("RANK", "0") != "0":  # under torchrun all have the same predictor, the first process saves it
        return
    amed_engine.save_predictor(predictor, out)
    click.echo(predictor.plan.describe() if predictor.plan else "")
    if rounds:  # none where a finished run was resumed
        click.echo(f"final loss per interval: {' '.join(f'{loss:.4g}' for loss in rounds[-1].losses)}")
    click.echo(str(predictor.report))
    click.echo(f"wrote {out}")
