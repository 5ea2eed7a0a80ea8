"""What a command is told of the network in a file: how it is wrapped, and facts that the file does not say."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import click

from amed_engine.cli.options import Decorator, options, range_options, where_options

TOLD = ("prediction", "betas", "steps", "shape", "label_dim", "labels", "null_class")


def _shape(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """3x32x32 or 3,32,32."""
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*([x,][1-9]\d*)*", text):
        raise click.BadParameter(f"{text!r} is no shape of a sample; write e.g. 3x32x32", context, option)
    return tuple(map(int, re.split("[x,]", text)))


LABEL_KINDS = ("rows", "index", "float", "vector")
label_kind_option = click.option(
    "--labels",
    type=click.Choice(LABEL_KINDS),
    help="What a raw network is told of classes: one-hot rows or an index; or it is told numbers.",
    show_default="what it takes",
)
facts_options = options(
    click.option(
        "--prediction",
        help="What a raw network in a file predicts: epsilon, v, x0, flow, edm, cm, vp, ve, iddpm, score, denoised or "
        "consistency.",
        show_default="none: the file holds a denoiser",
    ),
    click.option(
        "--betas",
        help="Of the training steps of epsilon, v and x0: linear, scaled_linear or cosine.",
        show_default="linear",
    ),
    click.option("--shape", callback=_shape, help="Of one sample, e.g. 3x32x32.", show_default="the file's"),
    click.option("--label-dim", type=click.IntRange(min=0), help="Number of classes.", show_default="the file's"),
    click.option(
        "--steps",
        type=click.Choice(["integer"]),
        help="Of a raw network that looks its step up in a table: it is told the nearest.",
        show_default="fractions",
    ),
    click.option(
        "--null-class",
        type=click.IntRange(min=0),
        help="The class that means none to a raw network, for guidance.",
        show_default="none",
    ),
)
no_verify = click.option(
    "--no-verify",
    "verify",
    flag_value=False,
    default=True,
    show_default=False,
    help="Take a predictor or plan of another model, and no look at what --prediction says, or at a file's hash.",
)


def network_options(*, checks: bool = True) -> Decorator:
    """Options of a model, and what a file does not say of it; the command gets the name, or the network with that said.

    checks: the command compares predictors or plans with the model, and has `verify`; else it is for --prediction alone.
    """

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**asked: Any) -> Any:
            told = {name: asked.pop(name) for name in TOLD}
            verify = asked["verify"] if checks else asked.pop("verify")
            if not checks and not verify and told["prediction"] is None:
                raise click.UsageError("--no-verify is for the look at what --prediction says; leave it out")
            asked["model"], asked["weights"] = opened(asked["model"], asked["weights"], verify=verify, **told)
            return command(**asked)

        return options(where_options, facts_options, label_kind_option, range_options)(run)

    return decorate


def opened(model: str, weights: str | None, *, verify: bool, **told: Any) -> tuple[Any, str | None]:
    """The model and its weights as they are named, or the network with what is told of it. Raises click.UsageError."""
    if all(value is None for value in told.values()):
        return model, weights
    if told["prediction"] is not None:
        return _wrapped(model, weights, verify, **told), None
    for name in ("betas", "steps", "labels", "null_class"):
        if told[name] is not None:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is of a raw network; pass what it predicts as --prediction too, or leave it out"
            )
    if not os.path.exists(model):
        raise click.UsageError(
            f"--shape and --label-dim are for a network in a file that does not say them, got the model {model}; leave them out"
        )
    from amed_engine.engine.resolve import resolve

    known = resolve(model, weights=weights, shape=told["shape"], label_dim=told["label_dim"])
    known.network.sample_shape, known.network.label_dim = known.shape, known.label_dim
    return known.network, None


def _wrapped(model: str, weights: str | None, verify: bool, prediction: str, shape: Any, **told: Any) -> Any:
    from amed_engine.adapters import wrap
    from amed_engine.engine.resolve import opened as read
    from amed_engine.sampling.modules import said

    network = read(model, weights)
    shape = shape or said(network, "sample_shape")
    return wrap(network, prediction, shape=shape, verify=verify, **told)
