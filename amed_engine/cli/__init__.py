"""The command line: `amed sample | compare | evaluate | info | distill`.

Only click is imported at start-up; everything that needs torch is imported by the command that runs. Exit codes: 0, 1 for
a failure, 2 for bad usage, 130 for Ctrl-C. An error is one line on stderr; `amed --debug ...` shows the traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

import amed_engine
from amed_engine.commands.convert import convert
from amed_engine.commands.evaluate import evaluate
from amed_engine.commands.export import export
from amed_engine.commands.fit import fit
from amed_engine.commands.info import info
from amed_engine.commands.reproduce import reproduce
from amed_engine.commands.search_schedule import search_schedule
from amed_engine.commands.shared import (
    PAIRS,
    check_png,
    check_writable,
    default_device,
    drawing_options,
    grid_options,
    make_sampler,
    plan_options,
    typed,
    where_options,
    with_levels,
)
from amed_engine.console import App, run


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    sys.exit(run(app, args))


@click.group(
    "amed",
    cls=App,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(amed_engine.__version__, prog_name="amed")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def app(debug: bool) -> None:
    """Samples from a diffusion model in about five network evaluations."""


_preset: dict[str, Any] = {"show_default": "the preset's"}


# ---- commands ----


@app.command()
@where_options
@click.option("--seeds", default="0-63", help="One sample each, e.g. 0-63 or 1,5,9.")
@click.option("--nfe", type=int, help="Network evaluations per sample.", show_default="the predictor's, or 5")
@click.option("--solver", help="euler, heun, dpm, ipndm, deis, dpmpp or unipc.", show_default="the best at hand")
@plan_options
@drawing_options
@click.option("--out", type=click.Path(dir_okay=False), help="Write all samples as one PNG.")
@click.option("--outdir", type=click.Path(file_okay=False), help="Write a PNG per seed, 000042.png, to a folder.")
@click.option("--subdirs", is_flag=True, help="With --outdir: a folder per thousand seeds.")
def sample(seeds, class_labels, guidance, batch, out, outdir, subdirs, **asked) -> None:
    """Draw samples and save them as PNG."""
    if not (out or outdir):
        raise click.UsageError("nowhere to write; pass --out FILE.png or --outdir FOLDER")
    if subdirs and not outdir:
        raise click.UsageError("--subdirs needs --outdir")
    check_png(out)
    from amed_engine.engine import images
    from amed_engine.engine.seeds import parse_seeds

    numbers = parse_seeds(seeds)
    sampler = make_sampler(**typed(asked))
    images.check_pictures(sampler.model.shape)
    check_writable(out, outdir and images.seed_path(outdir, 0, False))
    pictures, seconds = [], 0.0
    for result in _drawn(sampler, numbers, batch, class_labels, guidance):
        seconds += result.seconds
        done = list(images.to_uint8(result.images))
        if outdir:
            images.save_each(outdir, done, result.seeds or (), subdirs)
        if out:
            pictures.extend(done)
    if out:
        images.save_grid(out, pictures)
    click.echo(result.plan.describe())
    click.echo(f"{len(numbers)} images, NFE {result.nfe}, {seconds:.2f} s, {len(numbers) / seconds:.1f} images/s")
    click.echo(f"backend {result.backend} on {sampler.device}")
    click.echo(f"wrote {' and '.join(filter(None, (out, outdir)))}")


@app.command()
@where_options
@click.option("--seeds", default="0-7", help="Columns of the picture.")
@click.option("--nfe", type=int, default=5, help="Network evaluations per sample.")
@grid_options
@drawing_options
@click.option("--samples", type=int, default=128, help="How many samples the RMSE is over.")
@click.option("--curve-samples", type=int, default=16, help="The same for the curves; 0 for no curves.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the picture, a PNG.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the numbers.")
def compare(model, seeds, nfe, samples, curve_samples, predictor, out, json_file, **shared) -> None:
    """All solvers on the same seeds at equal NFE: errors to a fine reference solution."""
    from amed_engine.checkpoints import atomic_write
    from amed_engine.engine.seeds import parse_seeds
    from amed_engine.evaluation import comparison as work
    from amed_engine.evaluation import figure

    check_png(out)
    numbers = parse_seeds(seeds)
    if out:
        figure.import_matplotlib()
    check_writable(out, None if json_file == "-" else json_file)
    comparison = work.compare(
        model,
        nfe,
        numbers,
        samples=samples,
        curve_samples=curve_samples,
        predictor=predictor,
        setting=work.Setting(**typed(with_levels(shared))),
        progress=sys.stderr.isatty(),
    )
    if out:
        atomic_write(out, figure.plot(comparison))
    text = json.dumps(comparison.to_json(), indent=2)
    if json_file and json_file != "-":
        atomic_write(json_file, f"{text}\n".encode())
    click.echo(text if json_file == "-" else comparison.table())


@app.command()
@where_options
@click.option("--nfe", type=int, default=5, help="Network evaluations per sample.")
@click.option("--preset", default="amed-solver", help="The paper's settings: amed-solver or amed-plugin.")
@click.option("--solver", help="amed, or one to refine: euler, dpm, ipndm, deis, dpmpp, unipc.", **_preset)
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
def distill(model, device, out, **options) -> None:
    """Train an AMED predictor for a model and save it."""
    from amed_engine.engine.model import place
    from amed_engine.engine.resolve import resolve

    resolved = resolve(model)
    place(resolved, device or default_device())
    check_writable(out)
    given = {name: value for name, value in options.items() if value not in (None, {})}
    rounds: list[Any] = []
    predictor = amed_engine.distill(resolved.network, progress=sys.stderr.isatty(), on_round=rounds.append, **given)
    if os.environ.get("RANK", "0") != "0":  # under torchrun all have the same predictor, the first process saves it
        return
    amed_engine.save_predictor(predictor, out)
    click.echo(predictor.plan.describe() if predictor.plan else "")
    if rounds:  # none where a finished run was resumed
        click.echo(f"final loss per interval: {' '.join(f'{loss:.4g}' for loss in rounds[-1].losses)}")
    click.echo(f"wrote {out}")


# ---- what they need ----


def _drawn(sampler, seeds, batch, class_labels, guidance) -> Iterator[amed_engine.SampleResult]:
    """Results batch by batch, under a progress bar where stderr is a terminal."""
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    # Steps count as fractions of an image. Not on a GPU: a callback would keep it from replaying its captured loop.
    stepwise = sampler.device.type == "cpu"
    with tqdm(total=len(seeds), desc="sample", unit="image", bar_format=form, disable=None) as bar:
        tick = (lambda step: bar.update(len(step.x) / step.steps)) if stepwise else None
        for start in range(0, len(seeds), batch):
            result = sampler.run(seeds[start : start + batch], class_labels, guidance, callback=tick)
            bar.update(0 if stepwise else len(result.images))
            yield result


for command in (convert, evaluate, export, fit, info, reproduce, search_schedule):
    app.add_command(command)
