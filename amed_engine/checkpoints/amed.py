"""Published AMED predictors as ours: same parameters, and their settings as a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amed_engine.checkpoints.native import restore
from amed_engine.checkpoints.plain_data import Record
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.solvers.arguments import told
from amed_engine.solvers.plan import Plan, make_plan
from amed_engine.solvers.schedule import make_schedule

MAX_LEVELS = 1000
OPTIONS = {"ipndm": ("max_order",), "dpmpp": ("max_order", "predict_x0", "lower_order_final")}


def to_predictor(model: Record, loss: Any, tensors: Mapping[str, Tensor], path: Path) -> AMEDPredictor:
    """The predictor in a published snapshot's `model`, with the plan that it and `loss` (the loss_fn) describe.

    Raises FileFormatError where settings are missing or contradict each other.
    """
    settings = model.state if isinstance(model.state, dict) else {}
    trained = loss.state if isinstance(loss, Record) and isinstance(loss.state, dict) else {}
    predictor = restore(AMEDPredictor, _arguments(settings, tensors, path), tensors, path).eval()
    try:
        predictor.plan = _plan(settings, trained)
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:  # a ConfigError is a ValueError
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise FileFormatError(f"{path}: its settings make no plan: {reason}") from error
    return predictor


def _arguments(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layers = [shapes.get(f"{name}.weight", ()) for name in ("enc_layer0", "enc_layer1", "map_layer0")]
    if any(len(shape) != 2 for shape in layers):
        raise FileFormatError(f"{path} is no AMED predictor: it has the tensors {', '.join(sorted(shapes)[:20])}")
    (hidden, inputs), (code, _), (embedding, _) = layers
    side = math.isqrt(inputs)
    if side**2 != inputs:
        raise FileFormatError(f"{path}: its predictor reads {inputs} values, which is no square bottleneck")
    scale_dir, scale_time = _scales(settings)
    return {
        "scale_dir": scale_dir,
        "scale_time": scale_time,
        "bottleneck": [side, side],
        "hidden_dim": hidden,
        "bottleneck_dim": code,
        "embedding_dim": embedding,
    }


def _scales(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The first release had fixed widths, and a switch for the second; later ones store both."""
    if isinstance(settings.get("scale_time"), bool):
        wide = settings.get("sampler_stu") == "dpmpp" and settings.get("predict_x0", True)
        return 0.05 if wide else 0.01, 0.2 if settings["scale_time"] else 0.0
    return settings.get("scale_dir", 0.0), settings.get("scale_time", 0.0)


def _plan(settings: Mapping[str, Any], trained: Mapping[str, Any]) -> Plan:
    solver, schedule = settings["sampler_stu"], settings["schedule_type"]
    if not isinstance(solver, str) or not isinstance(schedule, str):
        raise ConfigError(f"sampler_stu and schedule_type must be names, got {told(solver)} and {told(schedule)}")
    given = {name: settings.get(name) for name in OPTIONS.get(solver, ())}
    if solver == "dpmpp":
        given["thresholding"] = True  # of every data prediction, always
    rho = None if schedule == "logsnr" or settings["schedule_rho"] is None else float(settings["schedule_rho"])
    levels = _levels(settings, trained, rho)
    plan = make_plan(
        None,
        solver=solver,
        options={name: value for name, value in given.items() if value is not None},
        schedule=levels,
        afs=bool(settings["afs"]),
        midpoint=True,
        guidance_scale=float(settings["guidance_rate"]) if settings.get("guidance_type") == "cfg" else None,
    )
    return replace(plan, schedule=schedule, rho=rho)


def _levels(settings: Mapping[str, Any], trained: Mapping[str, Any], rho: float | None) -> Tensor:
    """The schedule's levels in float64; those recorded in training, in float32, where they are others."""
    count, recorded = settings["num_steps"], trained.get("t_steps")
    if type(count) is not int or not 2 <= count <= MAX_LEVELS:
        raise ConfigError(f"num_steps must be an integer from 2 to {MAX_LEVELS}, got {told(count)}")
    low, high = (_number(trained.get(name), default) for name, default in (("sigma_min", 0.002), ("sigma_max", 80.0)))
    computed = None
    if settings["schedule_type"] != "discrete":
        computed = make_schedule(settings["schedule_type"], count, low, high, rho)
    if not isinstance(recorded, Tensor):
        if computed is None:
            raise ConfigError("a discrete schedule needs the noise levels of the training, which are not in the file")
        return computed
    recorded = recorded.double().flatten()
    if len(recorded) != count:
        raise ConfigError(f"num_steps is {count}, but {len(recorded)} noise levels were recorded")
    # float32 arithmetic in another order, no more: then the exact ones.
    close = computed is not None and torch.allclose(recorded, computed, rtol=1e-3, atol=0)
    return computed if computed is not None and close else recorded


def _number(value: Any, default: float) -> float:
    value = default if value is None else value
    if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise ConfigError(f"a noise level is a {type(value).__name__}, expected a number")
    return float(value)
