"""Noise levels in a small JSON file, with the solver and evaluations they were chosen for."""

from __future__ import annotations

import os
from typing import Any

from amed_engine.errors import ConfigError
from amed_engine.solvers.files import read_json, write_json
from amed_engine.solvers.plan import LEVELS, Plan, plan_of_levels


def write_levels(plan: Plan, path: str | os.PathLike) -> None:
    """Write a training-free plan, whole or not at all. Raises ConfigError for one that needs a predictor."""
    if plan.midpoint:
        raise ConfigError("noise levels of a plan with a predictor are no schedule of their own; save the predictor")
    write_json(path, {**LEVELS, "plan": plan.to_json()}, streams=True)


def read_levels(path: str | os.PathLike) -> Plan:
    """The plan of a file that `write_levels` made. Raises FileFormatError, naming the file."""
    return read_json(path, _training_free, "noise levels", "write one with `amed search-schedule`")


def _training_free(data: Any) -> Plan:
    plan = plan_of_levels(data)
    if plan.midpoint:
        raise ConfigError("its plan needs a predictor, expected a training-free one")
    return plan
