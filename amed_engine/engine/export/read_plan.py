"""Tables as JSON, read strictly: every entry known, typed, finite and of a sane size. No torch in sight."""

from __future__ import annotations

import math
import os
from dataclasses import fields
from typing import Any

from amed_engine.engine.export.strict_json import (
    MAX_EVALUATIONS,
    MAX_SIZE,
    check_hash,
    decoded,
    entries,
    expect_names,
    flag,
    noise_levels,
    number,
    numbers,
    read_file,
    short_text,
    whole,
    wholes,
)
from amed_engine.engine.export.tableau import (
    BASIS,
    FORMAT,
    MAX_COLUMNS,
    MAX_MEAN,
    MAX_ROWS,
    VERSION,
    Coefficient,
    Evaluation,
    MeanRows,
    PredictorWeights,
    Tableau,
    check,
    refuse,
)
from amed_engine.errors import FileFormatError


def loads(text: str) -> Tableau:
    """A table from JSON text. Raises FileFormatError."""
    return from_json(decoded(text))


def read_plan(path: str | os.PathLike) -> Tableau:
    """The table of a file that `write_plan` made. Raises FileFormatError, naming the file."""
    return read_file(path, from_json)


def from_json(data: Any) -> Tableau:
    """The table that `to_json` wrote, perhaps with its hash; anything else raises FileFormatError."""
    return check_hash(data, _tableau)


def _tableau(data: Any) -> Tableau:
    if isinstance(data, dict) and "solver" in data:
        raise FileFormatError(
            "this is a recipe, of Plan.save: for Plan.load, Sampler(plan=) and --plan; write_plan makes tables"
        )
    if isinstance(data, dict) and data.get("version") == 1:
        data = _of_version_1(data)
    names = ("format", "version", "nfe", *(field.name for field in fields(Tableau)))
    expect_names(data, names, "plan")
    if data["format"] != FORMAT or whole(data["version"], "version", 0) not in (1, VERSION):
        refuse("format", f"{data['format']!r} version {data['version']!r}", f"{FORMAT!r} version 1 or {VERSION}")
    evaluations = entries(data["evaluations"], "evaluations", 1, MAX_EVALUATIONS)
    plan = Tableau(
        sigmas=noise_levels(data["sigmas"], "sigmas", 2, MAX_EVALUATIONS + 1),
        evaluations=tuple(_evaluation(e, f"evaluations[{i}]") for i, e in enumerate(evaluations)),
        shape=None if data["shape"] is None else wholes(data["shape"], "shape", 1, 8),
        description=short_text(data["description"], "description"),
        guidance_scale=None if data["guidance_scale"] is None else number(data["guidance_scale"], "guidance_scale"),
        predictor=None if data["predictor"] is None else _predictor(data["predictor"]),
        mean=None if data["mean"] is None else _mean(data["mean"]),
    )
    check(plan)
    if whole(data["nfe"], "nfe", 0) != plan.nfe:
        refuse("nfe", data["nfe"], f"{plan.nfe}, the evaluations' count")
    return plan


def _of_version_1(data: dict) -> dict:
    """With the entry that it did not have."""
    if "mean" in data:
        refuse("mean", "an entry", "none in version 1")
    return {**data, "mean": None}


# ---- entry by entry ----


def _evaluation(data: Any, where: str) -> Evaluation:
    expect_names(data, tuple(field.name for field in fields(Evaluation)), where)
    levels: dict[str, Any] = {
        name: None if data[name] is None else noise_levels(data[name], f"{where}.{name}", 1, MAX_ROWS)
        for name in ("sigma", "sigma_net")
    }
    if [len(level or ()) for level in levels.values()] != [len(levels["sigma"] or ())] * 2:
        refuse(f"{where}.sigma_net", data["sigma_net"], "one level for each of sigma")
    rows = entries(data["coefficients"], f"{where}.coefficients", 1, MAX_ROWS)
    flags: dict[str, Any] = {
        name: flag(data[name], f"{where}.{name}") for name in ("moves_x", "x_is_y", "analytic", "threshold")
    }
    predict = data["predict"]
    return Evaluation(
        **levels,
        columns=wholes(data["columns"], f"{where}.columns", 1, MAX_COLUMNS, least=0),
        coefficients=tuple(_row(row, f"{where}.coefficients[{m}]") for m, row in enumerate(rows)),
        new_directions=whole(data["new_directions"], f"{where}.new_directions", 0),
        keep=whole(data["keep"], f"{where}.keep", 0),
        predict=None if predict is None else noise_levels(predict, f"{where}.predict", 2, 2),  # type: ignore[arg-type]
        **flags,
    )


def _row(data: Any, where: str) -> tuple[Coefficient, ...]:
    return tuple(
        numbers(c, where, len(BASIS), len(BASIS)) if isinstance(c, list) else number(c, where)
        for c in entries(data, where, 1, MAX_COLUMNS)
    )


def _predictor(data: Any) -> PredictorWeights:
    expect_names(data, tuple(field.name for field in fields(PredictorWeights)), "predictor")
    sizes = {n: whole(data[n], f"predictor.{n}", 1) for n in ("hidden", "encoded", "noise_channels")}
    widths = {n: number(data[n], f"predictor.{n}") for n in ("scale_dir", "scale_time")}
    if not all(0 <= width < 1 for width in widths.values()):
        refuse("predictor", widths, "half-widths in [0, 1)")
    half = sizes["noise_channels"] // 2
    if sizes["noise_channels"] % 2 or sizes["noise_channels"] > 64:
        refuse("predictor.noise_channels", sizes["noise_channels"], "an even number up to 64")
    if not isinstance(data["parameters"], dict):
        refuse("predictor.parameters", type(data["parameters"]).__name__, "an object")
    frequencies = numbers(data["frequencies"], "predictor.frequencies", half, half)
    bottleneck: Any = wholes(data["bottleneck"], "predictor.bottleneck", 2, 2)
    draft = PredictorWeights(**widths, bottleneck=bottleneck, **sizes, frequencies=frequencies, parameters={})
    shapes = draft.shapes()
    expect_names(data["parameters"], tuple(shapes), "predictor.parameters")
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    parameters = {n: numbers(data["parameters"][n], f"predictor.{n}", count, count) for n, count in counts.items()}
    return PredictorWeights(**{**{f.name: getattr(draft, f.name) for f in fields(draft)}, "parameters": parameters})


def _mean(data: Any) -> MeanRows:
    expect_names(data, tuple(field.name for field in fields(MeanRows)), "mean")
    rows = entries(data["rows"], "mean.rows", 1, 1 + MAX_SIZE)
    values = (numbers(row, f"mean.rows[{k}]", 1, MAX_MEAN) for k, row in enumerate(rows))
    return MeanRows.of(whole(data["classes"], "mean.classes", 0), values)
