"""What commands share: values of options, and the sampler that they ask for. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def parse_pairs(context: click.Context, option: click.Parameter, pairs: Sequence[str]) -> dict[str, Any]:
    """name=value, the value read as a number, true or false, or else as text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not (name and value):
            raise click.BadParameter(f"{pair!r} is not name=value; write e.g. max_order=3", context, option)
        try:
            options[name] = json.loads(value.lower())
        except ValueError:
            options[name] = value
    return options


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def make_sampler(model: str, predictor: str | None, **asked: Any) -> Any:
    """The sampler of a command's options, device and dtype as the engine takes them; predictor "none" keeps the bundled one
    away, and a schedule may be a file of noise levels."""
    from amed_engine.plan import best_training_free
    from amed_engine.sampler import Sampler

    asked = with_levels(asked)
    if predictor == "none":
        predictor = None
        # A solver by name keeps the bundled predictor away.
        if not (asked["solver"] or asked["solver_options"]):
            best = best_training_free(5 if asked["nfe"] is None else asked["nfe"])
            asked = {**asked, "solver": best.solver, "solver_options": dict(best.options)}
    return Sampler(model, predictor, **asked)


def with_levels(asked: dict[str, Any]) -> dict[str, Any]:
    """The options with a schedule that is a file read: its levels, and its solver and analytic first step where none were
    asked for. Raises FileFormatError and ConfigError."""
    from amed_engine.errors import ConfigError
    from amed_engine.schedule_file import read_levels

    if (name := asked["schedule"]) is None or not (name.endswith(".json") or Path(name).is_file()):
        return asked
    if asked["rho"] is not None:
        raise ConfigError("rho is the exponent of a schedule by name, not of noise levels in a file; leave it out")
    plan, asked = read_levels(name), dict(asked)
    asked["schedule"] = plan.levels
    if "solver" not in asked:  # compare has all of them
        return asked
    if asked["solver"] is None:
        asked |= {"solver": plan.solver, "solver_options": asked["solver_options"] or dict(plan.options)}
    if asked["afs"] is None and asked["nfe"] is None:
        asked["afs"] = plan.afs
    return asked
