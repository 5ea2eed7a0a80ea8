"""`amed export`: the whole sampling loop as one file, or as JSON what a host with a network of its own needs."""

from __future__ import annotations

import click

from amed_engine.cli.network import network_options
from amed_engine.cli.options import check_writable, make_sampler, sampler_options

FORMATS = ("pt2", "exported", "onnx", "plan", "schedule")


@click.command()
@network_options()
@sampler_options
@click.option(
    "--predictor",
    help="Path of a predictor, or none to sample without.",
    show_default="the bundled one, without a solver",
)
@click.option(
    "--guidance", type=float, help="Strength of classifier-free guidance, fixed in the file.", show_default="none"
)
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", help="Of the sampling state.")
@click.option("--format", type=click.Choice(FORMATS), default="pt2", help="pt2: compiled; plan and schedule: JSON.")
@click.option("--freeze", is_flag=True, help="In a plan: constants in place of the predictor, asked without features.")
@click.option("--max-batch", type=int, default=256, help="Largest batch of one call.")
@click.option(
    "--verify/--no-verify",
    default=True,
    help="Refuse a file that does not draw the same images, and a predictor or plan of another model.",
)
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="Where to write it, e.g. loop.pt2.")
def export(guidance, format, freeze, max_batch, verify, out, **asked) -> None:
    """Write the whole sampling loop, network and predictor included, to one file; or without the network as JSON."""
    if freeze and format != "plan":
        raise click.UsageError(f"--freeze is for --format plan, got {format}")
    check_writable(out)
    sampler = make_sampler(**asked, verify=verify)
    options = {"freeze": True} if freeze else None
    done = sampler.export(out, format, guidance_scale=guidance, max_batch=max_batch, verify=verify, options=options)
    click.echo(done.plan.describe())
    for batch, difference in done.differences.items():
        click.echo(f"largest difference to the sampler on a batch of {batch}: {difference:.2g}")
    click.echo(f"wrote {done.path}, {done.path.stat().st_size:,} bytes")
