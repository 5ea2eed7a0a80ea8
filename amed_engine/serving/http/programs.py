"""A solver inside a request: a predictor's file or a recipe, checked as files are, bounded before they are read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from amed_engine.checkpoints.native import load_predictor
from amed_engine.errors import AmedError, FileFormatError
from amed_engine.sampling.predictors import Predictor
from amed_engine.serving.http import bodies
from amed_engine.serving.http.errors import Refusal
from amed_engine.serving.http.limits import Limits
from amed_engine.serving.http.schemas import Program, refusal
from amed_engine.solvers.plan import Plan, plan_of_levels


def options(program: Program, limits: Limits) -> dict[str, Any]:
    """As `ContinuousSampler.submit` takes it: predictor or plan. Raises Refusal and FileFormatError."""
    if (program.predictor is None) == (program.plan is None):
        raise refusal("program", "program must have either predictor or plan")
    if program.plan is not None:
        return {"plan": _plan(program.plan, limits)}
    return {"predictor": _predictor(program.predictor or "", limits)}


def check_evaluations(found: int, limits: Limits) -> None:
    """Raises Refusal."""
    if found > limits.nfe:
        raise refusal("nfe", f"{found} evaluations per sample were asked for, and at most {limits.nfe} are served")


def _plan(data: dict[str, Any], limits: Limits) -> Plan:
    _check_size(len(json.dumps(data)), "plan", limits)
    if isinstance(levels := data.get("sigmas"), list):
        check_evaluations(len(levels) - 2, limits)  # before an update is built for each; the first may be free
    try:
        plan = plan_of_levels(data) if "format" in data else Plan.from_json(data)
    except AmedError as error:
        raise FileFormatError(f"program.plan: {error}") from error
    check_evaluations(plan.nfe, limits)
    return plan


def _predictor(text: str, limits: Limits) -> Predictor:
    _check_size(len(text) * 3 // 4, "predictor", limits)
    predictor = _read(bodies.decoded("program.predictor", text))
    if predictor.plan is not None:
        check_evaluations(predictor.plan.nfe, limits)
    return predictor


def _read(data: bytes) -> Predictor:
    """By a file, as every predictor is read: safetensors and JSON, no pickle."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictor.safetensors"
        path.write_bytes(data)
        try:
            return load_predictor(path)
        except AmedError as error:
            raise FileFormatError(str(error).replace(str(path), "program.predictor")) from error


def _check_size(size: int, name: str, limits: Limits) -> None:
    if size > limits.program:
        message = f"program.{name} has some {size} bytes, more than the {limits.program} that it may have"
        raise Refusal(413, "too_large", message, f"program.{name}")
