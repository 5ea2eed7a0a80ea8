"""`amed evaluate`: how good a sampler's samples are."""

from __future__ import annotations

import sys

import click

from amed_engine.cli.network import network_options, no_verify
from amed_engine.cli.options import check_writable, drawing_options, make_sampler, sampler_options, show
from amed_engine.errors import ConfigError

BUNDLED = "digits"


@click.command()
@network_options()
@no_verify
@click.option("--seeds", default="0-511", help="One sample each, e.g. 0-511.")
@sampler_options
@drawing_options
@click.option(
    "--reference", default="deis-fine", help="deis-fine, heun-fine, a folder of PNG or an .npz of statistics."
)
@click.option("--data", help="Real images: digits, a folder, an .npz, or none.", show_default="digits for digits")
@click.option("--features", default="pixels", help="pixels, digits or inception.")
@click.option("--classifier", type=click.Choice(["digits", "none"]), show_default="digits for digits")
@click.option("--save-statistics", type=click.Path(dir_okay=False), help="Write the samples' mu and sigma, an .npz.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the numbers.")
def evaluate(
    model,
    seeds,
    class_labels,
    guidance_scale,
    reference,
    data,
    features,
    classifier,
    batch,
    save_statistics,
    json_file,
    **asked,
) -> None:
    """Distance to a fine solution, Frechet distance, precision and recall, class accuracy."""
    from amed_engine.engine.seeds import parse_seeds
    from amed_engine.evaluation import quality as evaluation
    from amed_engine.evaluation.comparison import Setting

    if save_statistics and not save_statistics.endswith(".npz"):
        raise ConfigError(f"statistics are saved as .npz, got {save_statistics!r}")
    check_writable(save_statistics, None if json_file == "-" else json_file, streams=True)
    own = BUNDLED if model == BUNDLED else "none"
    given = {"data": data or own, "classifier": classifier or own}
    found = evaluation.evaluate(
        make_sampler(model, **asked),
        parse_seeds(seeds),
        reference=reference,
        features=features,
        setting=Setting(class_labels, guidance_scale, batch=batch),
        progress=sys.stderr.isatty(),
        **{name: None if value == "none" else value for name, value in given.items()},
    )
    if save_statistics:
        found.statistics.save(save_statistics)
    show(found, json_file)
