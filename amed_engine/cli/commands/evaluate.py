"""`amed evaluate`: how good a sampler's samples are."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import click

from amed_engine.cli.network import network_options, no_verify
from amed_engine.cli.options import (
    check_writable,
    default_device,
    drawing_options,
    given_beside,
    make_sampler,
    sampler_options,
    show,
)
from amed_engine.errors import ConfigError

logger = logging.getLogger("amed_engine")

BUNDLED = "digits"
DRAWN = "deis-fine"  # the reference of samples that are drawn
# Options that say how samples are judged, of whatever origin they are.
JUDGING = {"samples", "reference", "data", "features", "classifier", "save_statistics", "json_file", "device", "batch"}


def _without_drawing(command: Callable) -> Callable:
    """Beside --samples nothing is drawn: whatever says how is refused before it is looked at."""

    @functools.wraps(command)
    def run(**asked: Any) -> Any:
        drawing = given_beside(JUDGING)
        if asked["samples"] is not None and drawing:
            raise click.UsageError(f"--samples judges what is there and draws nothing; leave {', '.join(drawing)} out")
        if asked["samples"] == "":
            raise click.UsageError(
                "--samples is empty, expected a dataset, a shard or pictures; name them, or leave it out"
            )
        return command(**asked)

    return run


@click.command()
@_without_drawing
@network_options()
@no_verify
@click.option("--seeds", default="0-511", help="One sample each, e.g. 0-511.")
@click.option(
    "--samples", help="Samples that are there, in place of drawing: a dataset of amed generate, a shard, pictures."
)
@sampler_options
@drawing_options
@click.option(
    "--reference",
    help="deis-fine, heun-fine, a folder of PNG, a dataset or an .npz.",
    show_default="deis-fine; none with --samples",
)
@click.option(
    "--data", help="Real images: digits, a folder, a dataset, an .npz, or none.", show_default="digits for digits"
)
@click.option("--features", default="pixels", help="pixels, digits or inception.")
@click.option("--classifier", type=click.Choice(["digits", "none"]), show_default="digits for digits")
@click.option("--save-statistics", type=click.Path(dir_okay=False), help="Write the samples' mu and sigma, an .npz.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the numbers.")
def evaluate(
    model,
    seeds,
    samples,
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
    if save_statistics and not save_statistics.endswith(".npz"):
        raise ConfigError(f"statistics are saved as .npz, got {save_statistics!r}")
    check_writable(save_statistics, None if json_file == "-" else json_file, streams=True)
    chosen = {"features": features, "progress": sys.stderr.isatty()}
    if samples is not None:
        given = {"reference": reference, "data": data, "classifier": classifier}
        found = _judged(samples, given, batch=batch, device=asked["device"], **chosen)
    else:
        given = {"reference": reference or DRAWN, "data": data, "classifier": classifier}
        found = _drawn(model, seeds, given, (class_labels, guidance_scale, batch), asked, chosen)
    if save_statistics:
        found.statistics.save(save_statistics)
    elif not any((found.distance, found.to_reference, found.to_data, found.class_accuracy is not None)):
        logger.warning(
            "nothing is compared: pass --data or --reference, images to compare with, or --classifier digits"
        )
    show(found, json_file)


def _drawn(model: Any, seeds: str, given: dict, setting: tuple, asked: dict, chosen: dict) -> Any:
    from amed_engine.engine.seeds import parse_seeds
    from amed_engine.evaluation import quality
    from amed_engine.evaluation.comparison import Setting

    class_labels, guidance_scale, batch = setting
    return quality.evaluate(
        make_sampler(model, **asked),
        parse_seeds(seeds),
        setting=Setting(class_labels, guidance_scale, batch=batch),
        **_compared(given, model),
        **chosen,
    )


def _judged(samples: str, given: dict, *, device: str | None, **chosen: Any) -> Any:
    from amed_engine.evaluation.stored import about_of, evaluate_samples

    model = about_of(samples).get("model")
    return evaluate_samples(samples, device=device or default_device(), **_compared(given, model), **chosen)


def _compared(given: dict[str, str | None], model: Any) -> dict[str, str | None]:
    """What samples are compared with: the bundled model's digits where nothing else is asked for, nothing for none."""
    own = BUNDLED if model == BUNDLED else "none"
    found = {"reference": given["reference"], "data": given["data"] or own, "classifier": given["classifier"] or own}
    return {name: None if value == "none" else value for name, value in found.items()}
