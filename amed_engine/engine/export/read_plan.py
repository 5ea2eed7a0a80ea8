"""Static plans and schedules as JSON, read strictly: every entry known, typed, finite and of a sane size. No torch in sight."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from amed_engine.errors import FileFormatError
from amed_engine.static_plan import (
    BASIS,
    FORMAT,
    MAX_COLUMNS,
    MAX_ROWS,
    VERSION,
    Coefficient,
    Evaluation,
    PredictorWeights,
    StaticPlan,
    check,
    refuse,
)

MAX_BYTES = 16 << 20
MAX_EVALUATIONS = 1000
LARGEST = 1e30  # of a number, so that float32 holds it
MAX_SIZE = 1 << 16  # of a predictor's layers
TIMESTEPS = ("log_sigma", "discrete")
SCHEDULE = (
    *("format", "version", "description", "timestep_type"),
    *("sigmas", "timesteps", "scale_dir", "scale_time", "afs"),
)

Read = TypeVar("Read")


def loads(text: str) -> StaticPlan:
    """A plan from JSON text. Raises FileFormatError."""
    return from_json(_decoded(text))


def read_plan(path: str | os.PathLike) -> StaticPlan:
    """A plan from a file that `write_plan` made. Raises FileFormatError, naming the file."""
    return _read(path, from_json)


def read_schedule(path: str | os.PathLike) -> dict[str, Any]:
    """The table of a file that `write_schedule` made. Raises FileFormatError, naming the file."""
    return _read(path, _schedule)


def _read(path: str | os.PathLike, made: Callable[[Any], Read]) -> Read:
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is not a file; write one with `amed export`")
    if path.stat().st_size > MAX_BYTES:
        raise FileFormatError(f"{path} has {path.stat().st_size} bytes, more than the {MAX_BYTES} it may have")
    try:
        return made(_decoded(path.read_text("utf-8")))
    except (UnicodeDecodeError, FileFormatError) as error:
        raise FileFormatError(f"{path}: {error}") from error


def _decoded(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"it is not valid JSON: {error}; write it again with `amed export`") from error


def from_json(data: Any) -> StaticPlan:
    """The plan that `to_json` wrote; anything else raises FileFormatError."""
    names = ("format", "version", "nfe", *(field.name for field in fields(StaticPlan)))
    _expect_names(data, names, "plan")
    if data["format"] != FORMAT or _size(data["version"], "version", 0) != VERSION:
        refuse("format", f"{data['format']!r} version {data['version']!r}", f"{FORMAT!r} version {VERSION}")
    evaluations = _list(data["evaluations"], "evaluations", 1, MAX_EVALUATIONS)
    plan = StaticPlan(
        sigmas=_levels(data["sigmas"], "sigmas", 2, MAX_EVALUATIONS + 1),
        evaluations=tuple(_evaluation(e, f"evaluations[{i}]") for i, e in enumerate(evaluations)),
        shape=None if data["shape"] is None else _sizes(data["shape"], "shape", 1, 8),
        description=_text(data["description"], "description"),
        guidance_scale=None if data["guidance_scale"] is None else _number(data["guidance_scale"], "guidance_scale"),
        predictor=None if data["predictor"] is None else _predictor(data["predictor"]),
    )
    check(plan)
    if _size(data["nfe"], "nfe", 0) != plan.nfe:
        refuse("nfe", data["nfe"], f"{plan.nfe}, the evaluations' count")
    return plan


def _schedule(data: Any) -> dict[str, Any]:
    _expect_names(data, SCHEDULE, "schedule")
    if data["format"] != "amed_schedule" or _size(data["version"], "version", 0) != VERSION:
        refuse("format", f"{data['format']!r} version {data['version']!r}", f"'amed_schedule' version {VERSION}")
    if data["timestep_type"] not in TIMESTEPS:
        refuse("timestep_type", data["timestep_type"], f"one of {', '.join(TIMESTEPS)}")
    _text(data["description"], "description")
    sigmas = _levels(data["sigmas"], "sigmas", 2, MAX_EVALUATIONS + 1)
    if sigmas[0] <= sigmas[-1]:  # a learned midpoint may lie outside its interval, so no more than that
        refuse("sigmas", f"levels from {sigmas[0]:g} to {sigmas[-1]:g}", "a start above the end")
    _numbers(data["timesteps"], "timesteps", len(sigmas), len(sigmas))
    intervals = len(_levels(data["scale_dir"], "scale_dir", 1, len(sigmas) - 1))
    _levels(data["scale_time"], "scale_time", intervals, intervals)
    for k, free in enumerate(_list(data["afs"], "afs", len(sigmas) - 1, len(sigmas) - 1)):
        if _flag(free, f"afs[{k}]") and k:
            refuse(f"afs[{k}]", free, "true for the first evaluation only")
    return data


# ---- entry by entry ----


def _evaluation(data: Any, where: str) -> Evaluation:
    _expect_names(data, tuple(field.name for field in fields(Evaluation)), where)
    levels: dict[str, Any] = {
        name: None if data[name] is None else _levels(data[name], f"{where}.{name}", 1, MAX_ROWS)
        for name in ("sigma", "sigma_net")
    }
    if [len(level or ()) for level in levels.values()] != [len(levels["sigma"] or ())] * 2:
        refuse(f"{where}.sigma_net", data["sigma_net"], "one level for each of sigma")
    rows = _list(data["coefficients"], f"{where}.coefficients", 1, MAX_ROWS)
    flags: dict[str, Any] = {
        name: _flag(data[name], f"{where}.{name}") for name in ("moves_x", "x_is_y", "analytic", "threshold")
    }
    predict = data["predict"]
    return Evaluation(
        **levels,
        columns=_sizes(data["columns"], f"{where}.columns", 1, MAX_COLUMNS, least=0),
        coefficients=tuple(_row(row, f"{where}.coefficients[{m}]") for m, row in enumerate(rows)),
        new_directions=_size(data["new_directions"], f"{where}.new_directions", 0),
        keep=_size(data["keep"], f"{where}.keep", 0),
        predict=None if predict is None else _levels(predict, f"{where}.predict", 2, 2),  # type: ignore[arg-type]
        **flags,
    )


def _row(data: Any, where: str) -> tuple[Coefficient, ...]:
    return tuple(
        _numbers(c, where, len(BASIS), len(BASIS)) if isinstance(c, list) else _number(c, where)
        for c in _list(data, where, 1, MAX_COLUMNS)
    )


def _predictor(data: Any) -> PredictorWeights:
    _expect_names(data, tuple(field.name for field in fields(PredictorWeights)), "predictor")
    sizes = {n: _size(data[n], f"predictor.{n}", 1) for n in ("hidden", "encoded", "noise_channels")}
    widths = {n: _number(data[n], f"predictor.{n}") for n in ("scale_dir", "scale_time")}
    if not all(0 <= width < 1 for width in widths.values()):
        refuse("predictor", widths, "half-widths in [0, 1)")
    half = sizes["noise_channels"] // 2
    if sizes["noise_channels"] % 2 or sizes["noise_channels"] > 64:
        refuse("predictor.noise_channels", sizes["noise_channels"], "an even number up to 64")
    if not isinstance(data["parameters"], dict):
        refuse("predictor.parameters", type(data["parameters"]).__name__, "an object")
    frequencies = _numbers(data["frequencies"], "predictor.frequencies", half, half)
    bottleneck: Any = _sizes(data["bottleneck"], "predictor.bottleneck", 2, 2)
    draft = PredictorWeights(**widths, bottleneck=bottleneck, **sizes, frequencies=frequencies, parameters={})
    shapes = draft.shapes()
    _expect_names(data["parameters"], tuple(shapes), "predictor.parameters")
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    parameters = {n: _numbers(data["parameters"][n], f"predictor.{n}", count, count) for n, count in counts.items()}
    return PredictorWeights(**{**{f.name: getattr(draft, f.name) for f in fields(draft)}, "parameters": parameters})


def _expect_names(data: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(data, dict):
        refuse(where, type(data).__name__, "an object")
    if set(data) != set(names):
        missing, unknown = sorted(set(names) - set(data)), sorted(set(data) - set(names))
        refuse(where, f"unknown {_few(unknown)}, missing {_few(missing)}", f"exactly {', '.join(names)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "") if names else "nothing"


def _list(data: Any, where: str, low: int, high: int) -> list:
    if not isinstance(data, list) or not low <= len(data) <= high:
        refuse(
            where, len(data) if isinstance(data, list) else type(data).__name__, f"a list of {low} to {high} entries"
        )
    return data


def _number(data: Any, where: str) -> float:
    if not isinstance(data, (int, float)) or isinstance(data, bool) or not abs(data) <= LARGEST:
        refuse(where, str(data)[:40], f"a number up to {LARGEST:g}")
    return float(data)


def _numbers(data: Any, where: str, low: int, high: int) -> tuple[float, ...]:
    return tuple(_number(value, where) for value in _list(data, where, low, high))


def _levels(data: Any, where: str, low: int, high: int) -> tuple[float, ...]:
    levels = _numbers(data, where, low, high)
    if not all(level >= 1 / LARGEST for level in levels):
        refuse(where, list(levels), "positive noise levels")
    return levels


def _size(data: Any, where: str, low: int) -> int:
    number = _number(data, where)
    if not number.is_integer() or not low <= number <= MAX_SIZE:
        refuse(where, str(data)[:40], f"a whole number from {low} to {MAX_SIZE}")
    return int(number)


def _sizes(data: Any, where: str, low: int, high: int, *, least: int = 1) -> tuple[int, ...]:
    return tuple(_size(value, where, least) for value in _list(data, where, low, high))


def _flag(data: Any, where: str) -> bool:
    if not isinstance(data, bool):
        refuse(where, str(data)[:40], "true or false")
    return data


def _text(data: Any, where: str) -> str:
    if not isinstance(data, str) or len(data) > 1000:
        refuse(where, type(data).__name__, "text of at most 1000 characters")
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("an object names an entry twice")
    return data
