"""`--weights`, for every command that takes a published model by its name."""

from __future__ import annotations

import os

import click

VARIABLE = "AMED_WEIGHTS"


def _remember(context: click.Context, _: click.Parameter, place: str | None) -> None:
    """As if the environment said so, until the command ends: names are looked up far below the command line."""
    if place is None:
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = place
    context.call_on_close(lambda: _restore(before))


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = before


weights_option = click.option(
    "--weights",
    type=click.Path(exists=True),
    expose_value=False,
    callback=_remember,
    help="File or folder of a published model's weights.",
    show_default=VARIABLE,
)
