"""The command line, `amed COMMAND`; commands/ has a file for each.

Only click is imported at start-up; everything that needs torch is imported by the command that runs. Exit codes: 0, 1 for
a failure, 2 for bad usage, 130 for Ctrl-C and SIGTERM. An error is one line on stderr; `amed --debug ...` shows the traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import amed_engine
from amed_engine.cli.commands.bench_serve import bench_serve
from amed_engine.cli.commands.calibrate import calibrate
from amed_engine.cli.commands.compare import compare
from amed_engine.cli.commands.convert import convert
from amed_engine.cli.commands.distill import distill
from amed_engine.cli.commands.evaluate import evaluate
from amed_engine.cli.commands.export import export
from amed_engine.cli.commands.fit import fit
from amed_engine.cli.commands.generate import generate
from amed_engine.cli.commands.info import info
from amed_engine.cli.commands.reproduce import reproduce
from amed_engine.cli.commands.sample import sample
from amed_engine.cli.commands.search_schedule import search_schedule
from amed_engine.cli.commands.serve import serve
from amed_engine.cli.console import App, run


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


for command in (
    bench_serve,
    calibrate,
    compare,
    convert,
    distill,
    evaluate,
    export,
    fit,
    generate,
    info,
    reproduce,
    sample,
    search_schedule,
    serve,
):
    app.add_command(command)
