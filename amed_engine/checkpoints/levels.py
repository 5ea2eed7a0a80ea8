"""Noise levels in a small JSON file, with the solver and evaluations they were chosen for."""

from __future__ import annotations

import json
import os
from pathlib import Path

from amed_engine.checkpoints import atomic_write
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.solvers.plan import Plan

FORMAT, VERSION = "amed_levels", 1
MAX_BYTES = 1 << 20


def write_levels(plan: Plan, path: str | os.PathLike) -> None:
    """Write a training-free plan, whole or not at all. Raises ConfigError for one that needs a predictor."""
    if plan.midpoint:
        raise ConfigError("noise levels of a plan with a predictor are no schedule of their own; save the predictor")
    data = {"format": FORMAT, "version": VERSION, "plan": plan.to_json()}
    atomic_write(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def read_levels(path: str | os.PathLike) -> Plan:
    """The plan of a file that `write_levels` made. Raises FileFormatError, naming the file."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise FileFormatError(f"{path} is no file of at most {MAX_BYTES} bytes; write one with `amed search-schedule`")
    try:
        data = json.loads(path.read_text("utf-8"))
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ConfigError(f"expected format {FORMAT!r}, version {VERSION}; write one with `amed search-schedule`")
        plan = Plan.from_json(data.get("plan"))
    except (ValueError, RecursionError, ConfigError) as error:
        raise FileFormatError(f"{path} holds no noise levels: {error}") from error
    if plan.midpoint:
        raise FileFormatError(f"{path} holds a plan that needs a predictor, expected a training-free one")
    return plan
