"""`amed compare`: all solvers on the same seeds."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from amed_engine.cli.network import network_options, no_verify
from amed_engine.cli.options import (
    check_png,
    check_writable,
    drawing_options,
    first_step_options,
    grid_options,
    show,
    typed,
)


@click.command()
@network_options()
@no_verify
@click.option("--seeds", default="0-7", help="Columns of the picture.")
@click.option("--nfe", type=int, default=5, help="Network evaluations per sample.")
@grid_options
@first_step_options
@drawing_options
@click.option("--samples", type=int, default=128, help="How many samples the RMSE is over.")
@click.option("--curve-samples", type=int, default=16, help="The same for the curves; 0 for no curves.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the picture, a PNG.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the numbers.")
def compare(model, weights, seeds, nfe, samples, curve_samples, predictor, out, json_file, **shared) -> None:
    """All solvers on the same seeds at equal NFE: errors to a fine reference solution.

    Each on time_uniform, with an evaluation as its first step where the NFE allows, unless --schedule and --afs say otherwise.
    A predictor keeps the noise levels it was trained for; --predictor brings their range to the other solvers too, unless
    --sigma-min and --sigma-max say another, and each row is measured against a solution of its own range.
    """
    from amed_engine.engine.seeds import parse_seeds
    from amed_engine.evaluation import comparison as work
    from amed_engine.evaluation import figure
    from amed_engine.solvers.files import write_or_stream

    check_png(out)
    numbers = parse_seeds(seeds)
    if out:
        figure.import_matplotlib()
    check_writable(out, None if json_file == "-" else json_file, streams=True)
    given = typed({**shared, "nfe": nfe})
    comparison = work.compare(
        model,
        given.pop("nfe"),
        numbers,
        samples=samples,
        curve_samples=curve_samples,
        predictor=predictor,
        weights=weights,
        setting=work.Setting(**given),
        progress=sys.stderr.isatty(),
    )
    if out:
        write_or_stream(out, figure.plot(comparison))
    show(replace(comparison, model=click.get_current_context().params["model"]), json_file)
