"""`amed search-schedule`: noise levels for a training-free solver, by dynamic programming."""

from __future__ import annotations

import sys
from typing import Any

import click

from amed_engine.cli.labels import in_turn, label_option
from amed_engine.cli.network import network_options, no_verify
from amed_engine.cli.options import check_writable, first_step_options, open_network, parse_pairs
from amed_engine.solvers import alternatives, integrator_names


@click.command("search-schedule")
@network_options(checks=False)
@no_verify
@click.option("--nfe", type=int, default=5, help="Network evaluations per sample.")
@click.option("--solver", default="ipndm", help=f"{alternatives(integrator_names('none', 'optional'))}.")
@click.option("--solver-option", "solver_options", multiple=True, callback=parse_pairs, help="E.g. max_order=3.")
@first_step_options
@click.option("--cost", default="euler", help="Of which step: euler, or solver, if it has no memory (heun).")
@click.option("--coefficient", type=float, default=1.15, help="What an error counts more with every step before it.")
@click.option("--grid", type=int, default=61, help="Noise levels to choose from.")
@click.option("--samples", type=int, default=128, help="Latents that the teacher solves.")
@click.option("--batch", type=int, default=64, help="Latents at once.")
@label_option
@click.option("--guidance", "guidance_scale", type=float, help="Search for this guidance.", show_default="none")
@click.option("--seed", type=int, default=0, help="Of latents and labels.")
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="Where to write it, e.g. levels.json.")
def search_schedule(
    model, weights, device, nfe, solver, solver_options, afs, guidance_scale, class_labels, out, **options: Any
) -> None:
    """Find the noise levels on which a solver errs least, and save them for --schedule."""
    import amed_engine
    from amed_engine.checkpoints.levels import write_levels
    from amed_engine.engine.measure import measured
    from amed_engine.engine.resolve import resolve

    check_writable(out, streams=True)
    network = open_network(model, weights, device)
    options["conditions"] = in_turn(class_labels, network, min(options["batch"], options["samples"]))
    wished = {"solver": solver, "afs": afs, "guidance_scale": guidance_scale}
    levels = amed_engine.search_schedule(
        network, nfe=nfe, solver_options=solver_options, progress=sys.stderr.isatty(), **wished, **options
    )
    plan = measured(amed_engine.make_plan(nfe, options=solver_options, schedule=levels, **wished), resolve(network))
    write_levels(plan, out)
    click.echo(plan.describe())
    click.echo(f"noise levels {' '.join(f'{level:.4g}' for level in plan.sigmas)}")
    click.echo(f"wrote {out}")
