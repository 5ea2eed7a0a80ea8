"""`amed export`: the whole sampling loop as one file."""

from __future__ import annotations

import click

from amed_engine.commands.shared import default_device, where_options


@click.command()
@where_options
@click.option("--nfe", type=int, help="Network evaluations per sample.", show_default="the predictor's, or 5")
@click.option("--solver", help="euler, heun, dpm, ipndm, deis, dpmpp or unipc.", show_default="the best at hand")
@click.option("--schedule", help="time_uniform, polynomial or logsnr.", show_default="time_uniform")
@click.option("--rho", type=float, help="Exponent of the schedule.", show_default="1, of polynomial 7")
@click.option("--afs/--no-afs", default=None, help="First evaluation analytic and free.", show_default="if it fits")
@click.option("--predictor", help="Path of a predictor.", show_default="the bundled one")
@click.option("--guidance", "guidance_scale", type=float, help="Classifier-free guidance.", show_default="none")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", help="Of the sampling state.")
@click.option("--format", default="pt2", help="pt2 (compiled), exported, onnx; plan or schedule (JSON).")
@click.option("--max-batch", type=int, default=256, help="Largest batch of one call.")
@click.option("--verify/--no-verify", default=True, help="Refuse a file that does not draw the same images.")
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="Where to write it, e.g. loop.pt2.")
def export(model, predictor, device, dtype, guidance_scale, format, max_batch, verify, out, **wishes) -> None:
    """Write the whole sampling loop, network and predictor included, to one file."""
    import torch

    import amed_engine

    sampler = amed_engine.Sampler(
        model, predictor, device=device or default_device(), dtype=getattr(torch, dtype), **wishes
    )
    done = sampler.export(out, format, guidance_scale=guidance_scale, max_batch=max_batch, verify=verify)
    click.echo(sampler.plan.describe())
    for batch, difference in done.differences.items():
        click.echo(f"largest difference to the sampler on a batch of {batch}: {difference:.2g}")
    click.echo(f"wrote {done.path}, {done.path.stat().st_size:,} bytes")
