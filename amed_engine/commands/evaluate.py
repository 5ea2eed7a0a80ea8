"""`amed evaluate`: how good a sampler's samples are."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from amed_engine.commands.shared import default_device, make_sampler, parse_pairs
from amed_engine.commands.weights import weights_option

BUNDLED = "digits"


@click.command()
@click.option("--model", "--network", "model", default=BUNDLED, help="A bundled or published model's name, or a path.")
@weights_option
@click.option("--seeds", default="0-511", help="One sample each, e.g. 0-511.")
@click.option("--nfe", type=int, help="Network evaluations per sample.", show_default="the predictor's, or 5")
@click.option("--solver", help="euler, heun, dpm, ipndm, deis, dpmpp or unipc.", show_default="the best at hand")
@click.option("--solver-option", "solver_options", multiple=True, callback=parse_pairs, help="E.g. max_order=3.")
@click.option("--schedule", help="time_uniform, polynomial, logsnr, or a file of levels.", show_default="time_uniform")
@click.option("--rho", type=float, help="Exponent of the schedule.", show_default="1, of polynomial 7")
@click.option("--afs/--no-afs", default=None, help="First evaluation analytic and free.", show_default="if it fits")
@click.option("--predictor", help="A predictor's path, or none.", show_default="the bundled one")
@click.option("--class", "class_labels", type=int, help="Class of all samples.", show_default="drawn by each seed")
@click.option("--guidance", type=float, help="Strength of classifier-free guidance.", show_default="none")
@click.option(
    "--reference", default="deis-fine", help="deis-fine, heun-fine, a folder of PNG or an .npz of statistics."
)
@click.option("--data", help="Real images: digits, a folder, an .npz, or none.", show_default="digits for digits")
@click.option("--features", default="pixels", help="pixels, digits or inception.")
@click.option("--classifier", type=click.Choice(["digits", "none"]), show_default="digits for digits")
@click.option("--batch", type=click.IntRange(min=1), default=64, help="Samples computed at once.")
@click.option("--device", help="Where to run: cpu, cuda, cuda:1 ...", show_default="a GPU if there is one")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", help="Of the sampling state.")
@click.option("--save-statistics", type=click.Path(dir_okay=False), help="Write the samples' mu and sigma, an .npz.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the numbers.")
def evaluate(
    model,
    seeds,
    class_labels,
    guidance,
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
    from amed_engine import evaluation
    from amed_engine.checkpoints import atomic_write
    from amed_engine.compare import Setting
    from amed_engine.seeds import parse_seeds

    _check_writable(save_statistics, None if json_file == "-" else json_file)
    own = BUNDLED if model == BUNDLED else "none"
    given = {"data": data or own, "classifier": classifier or own}
    found = evaluation.evaluate(
        _sampler(model, **asked),
        parse_seeds(seeds),
        reference=reference,
        features=features,
        setting=Setting(class_labels, guidance, batch=batch),
        progress=sys.stderr.isatty(),
        **{name: None if value == "none" else value for name, value in given.items()},
    )
    if save_statistics:
        found.statistics.save(save_statistics)
    text = json.dumps(found.to_json(), indent=2)
    if json_file and json_file != "-":
        atomic_write(json_file, f"{text}\n".encode())
    click.echo(text if json_file == "-" else found.table())


def _check_writable(statistics: str | None, numbers: str | None) -> None:
    """Before the work rather than after it. What mkdir cannot do, the command line tells."""
    from amed_engine.errors import AmedError, ConfigError

    if statistics and not statistics.endswith(".npz"):
        raise ConfigError(f"statistics are saved as .npz, got {statistics!r}")
    for path in filter(None, (statistics, numbers)):
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise AmedError(f"cannot write to folder {folder}; choose another")


def _sampler(model: str, predictor: str | None, device: str | None, dtype: str, **asked: Any) -> Any:
    import torch

    return make_sampler(model, predictor, device=device or default_device(), dtype=getattr(torch, dtype), **asked)
