"""A program as numbers: per evaluation the noise levels and one small matrix. JSON, read strictly; no torch in sight.

A state is an anchor x, evaluation points y_1 .. y_K and past directions d_1, d_2, ... (newest first); it starts with
x = y_1 and no direction. An `Evaluation` with denoised D_1 .. D_K at the points takes it to

    [new directions, x, y] = C [columns of (x, y_1 .. y_K unless y is x, D_1 .. D_K, d_1, d_2, ...)]

and the last y is the sample. A coefficient of C is a number, or eight weights on `BASIS`: what an AMED predictor said.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from amed_engine.errors import FileFormatError

FORMAT, VERSION = "amed_plan", 1
# With r, c = scale_dir and m = sigma_next^r · sigma^(1-r) of the interval, in this order.
BASIS = ("1", "m", "1/m", "c", "c·m", "c/m", "c/r", "c/(r·m)")
MAX_BYTES = 16 << 20
MAX_EVALUATIONS = 1000
MAX_ROWS, MAX_COLUMNS = 8, 16  # of one `combine`
LARGEST = 1e30  # of a number, so that float32 holds it
MAX_SIZE = 1 << 16  # of a predictor's layers

Coefficient = float | tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation and what follows.

    sigma, sigma_net: noise level of each point, and the one told to the network; None for the predictor's midpoint m,
    told as scale_time·m. columns, coefficients: the matrix, rows by columns. new_directions: how many of its rows are
    directions; 0 where the denoised data are themselves. keep: directions kept afterwards. moves_x: a row is the new
    anchor, unless x_is_y. analytic: no network, D = x - s·x / sqrt(1 + s²). threshold: D is thresholded dynamically.
    predict: (sigma, sigma_next) of the interval whose midpoint the predictor chooses from this evaluation's features.
    """

    sigma: tuple[float, ...] | None
    sigma_net: tuple[float, ...] | None
    columns: tuple[int, ...]
    coefficients: tuple[tuple[Coefficient, ...], ...]
    new_directions: int
    keep: int
    moves_x: bool
    x_is_y: bool
    analytic: bool = False
    threshold: bool = False
    predict: tuple[float, float] | None = None

    @property
    def points(self) -> int:
        return 1 if self.sigma is None else len(self.sigma)

    @property
    def next_points(self) -> int:
        return len(self.coefficients) - self.new_directions - int(self.moves_x and not self.x_is_y)

    @property
    def learned(self) -> bool:
        return any(isinstance(c, tuple) for row in self.coefficients for c in row)


@dataclass(frozen=True)
class PredictorWeights:
    """An AMED predictor: half-widths of its scales, (h, w) of the features, frequencies and parameters, row by row.

    parameters: names of `AMEDPredictor.state_dict()`; a head that is absent has no entry, and its scale is 1.
    """

    scale_dir: float
    scale_time: float
    bottleneck: tuple[int, int]
    hidden: int
    encoded: int
    noise_channels: int
    frequencies: tuple[float, ...]
    parameters: Mapping[str, tuple[float, ...]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters that must be there."""
        pixels, inputs = self.bottleneck[0] * self.bottleneck[1], self.encoded + 2 * self.noise_channels
        layers = {
            "enc_layer0": (self.hidden, pixels),
            "enc_layer1": (self.encoded, self.hidden),
            "map_layer0": (self.noise_channels, self.noise_channels),
            "fc_r": (1, inputs),
            **({"fc_scale_dir": (1, inputs)} if self.scale_dir else {}),
            **({"fc_scale_time": (1, inputs)} if self.scale_time else {}),
        }
        return {f"{n}.{kind}": s if kind == "weight" else s[:1] for n, s in layers.items() for kind in ("weight", "bias")}


@dataclass(frozen=True)
class StaticPlan:
    """Everything a host needs but the network. sigmas: noise levels of the intervals; latents of unit variance are to be
    multiplied by the first. shape: of one sample, None for any. description: for people."""

    sigmas: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    shape: tuple[int, ...] | None = None
    description: str = ""
    guidance_scale: float | None = None
    predictor: PredictorWeights | None = None

    @property
    def nfe(self) -> int:
        """Network evaluations per sample; parallel points count one each."""
        return sum(0 if e.analytic else e.points for e in self.evaluations)

    def to_json(self) -> dict:
        return {"format": FORMAT, "version": VERSION, "nfe": self.nfe, **asdict(self)}

    def dumps(self) -> str:
        return json.dumps(self.to_json(), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: Any) -> StaticPlan:
        """The plan that `to_json` wrote; anything else raises FileFormatError."""
        names = ("format", "version", "nfe", *(field.name for field in fields(cls)))
        _expect_names(data, names, "plan")
        if data["format"] != FORMAT or data["version"] != VERSION:
            _refuse("format", f"{data['format']!r} version {data['version']!r}", f"{FORMAT!r} version {VERSION}")
        evaluations = _list(data["evaluations"], "evaluations", 1, MAX_EVALUATIONS)
        plan = cls(
            sigmas=_levels(data["sigmas"], "sigmas", 2, MAX_EVALUATIONS + 1),
            evaluations=tuple(_evaluation(e, f"evaluations[{i}]") for i, e in enumerate(evaluations)),
            shape=None if data["shape"] is None else _sizes(data["shape"], "shape", 1, 8),
            description=_text(data["description"], "description"),
            guidance_scale=None if data["guidance_scale"] is None else _number(data["guidance_scale"], "guidance_scale"),
            predictor=None if data["predictor"] is None else _predictor(data["predictor"]),
        )
        check(plan)
        if data["nfe"] != plan.nfe:
            _refuse("nfe", data["nfe"], f"{plan.nfe}, the evaluations' count")
        return plan


def loads(text: str) -> StaticPlan:
    """A plan from JSON text. Raises FileFormatError."""
    try:
        data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the plan is not valid JSON: {error}; write one with `amed export --format plan`") from error
    return StaticPlan.from_json(data)


def read_plan(path: str | os.PathLike) -> StaticPlan:
    """A plan from a file that `write_plan` made. Raises FileFormatError, naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is not a file; write one with `amed export --format plan`")
    if path.stat().st_size > MAX_BYTES:
        raise FileFormatError(f"{path} has {path.stat().st_size} bytes, more than the {MAX_BYTES} a plan may have")
    try:
        return loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, FileFormatError) as error:
        raise FileFormatError(f"{path}: {error}") from error


# ---- what the evaluations mean together ----


def check(plan: StaticPlan) -> None:
    """Walk through the evaluations: every column exists, every row has a meaning. Raises FileFormatError."""
    past, y_is_x, predicted = 0, True, False
    for i, e in enumerate(plan.evaluations):
        where = f"evaluations[{i}]"
        size = 1 + e.points * (1 if y_is_x else 2) + past
        _check_matrix(e, size, where)
        available = (e.new_directions or e.points) + past
        if e.new_directions > e.points or e.keep > available or (e.new_directions and e.keep < e.new_directions):
            _refuse(f"{where}.keep", f"{e.keep} with {e.new_directions} new", f"at most {available} directions to exist")
        predicted = predicted or e.predict is not None
        if (e.learned or e.sigma is None or e.predict) and (plan.predictor is None or not predicted):
            _refuse(where, "a coefficient or level of a predictor", "numbers, since none has spoken yet")
        if i + 1 < len(plan.evaluations):
            if e.next_points != plan.evaluations[i + 1].points:
                _refuse(f"{where}.coefficients", f"{e.next_points} points", f"{plan.evaluations[i + 1].points}, as evaluated next")
        elif e.next_points != 1:
            _refuse(f"{where}.coefficients", f"{e.next_points} points", "one, the sample")
        past, y_is_x = e.keep, e.x_is_y


def _check_matrix(e: Evaluation, size: int, where: str) -> None:
    if list(e.columns) != sorted(set(e.columns)) or not 0 <= e.columns[0] <= e.columns[-1] < size:
        _refuse(f"{where}.columns", list(e.columns), f"increasing numbers from 0 to {size - 1}")
    if e.next_points < 1 or (e.x_is_y and e.next_points != 1):
        _refuse(f"{where}.coefficients", f"{len(e.coefficients)} rows", "one for every direction, anchor and point")
    if e.x_is_y and not e.moves_x:
        _refuse(f"{where}.x_is_y", "true", "false, where the anchor does not move")
    if any(len(row) != len(e.columns) for row in e.coefficients):
        _refuse(f"{where}.coefficients", [len(row) for row in e.coefficients], f"{len(e.columns)} in each row")
    if (e.analytic or e.predict is not None) and (e.points != 1 or e.sigma is None):
        _refuse(f"{where}.sigma", e.sigma, "one noise level, for a first evaluation")


# ---- reading, entry by entry ----


def _evaluation(data: Any, where: str) -> Evaluation:
    _expect_names(data, tuple(field.name for field in fields(Evaluation)), where)
    levels = {
        name: None if data[name] is None else _levels(data[name], f"{where}.{name}", 1, MAX_ROWS)
        for name in ("sigma", "sigma_net")
    }
    if [len(level or ()) for level in levels.values()] != [len(levels["sigma"] or ())] * 2:
        _refuse(f"{where}.sigma_net", data["sigma_net"], "one level for each of sigma")
    rows = _list(data["coefficients"], f"{where}.coefficients", 1, MAX_ROWS)
    flags = {name: _flag(data[name], f"{where}.{name}") for name in ("moves_x", "x_is_y", "analytic", "threshold")}
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
        _refuse("predictor", widths, "half-widths in [0, 1)")
    half = sizes["noise_channels"] // 2
    if sizes["noise_channels"] % 2 or sizes["noise_channels"] > 64:
        _refuse("predictor.noise_channels", sizes["noise_channels"], "an even number up to 64")
    if not isinstance(data["parameters"], dict):
        _refuse("predictor.parameters", type(data["parameters"]).__name__, "an object")
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
        _refuse(where, type(data).__name__, "an object")
    if set(data) != set(names):
        missing, unknown = sorted(set(names) - set(data)), sorted(set(data) - set(names))
        _refuse(where, f"unknown {unknown[:4]}, missing {missing[:4]}", f"exactly {', '.join(names)}")


def _list(data: Any, where: str, low: int, high: int) -> list:
    if not isinstance(data, list) or not low <= len(data) <= high:
        _refuse(where, len(data) if isinstance(data, list) else type(data).__name__, f"a list of {low} to {high} entries")
    return data


def _number(data: Any, where: str) -> float:
    if not isinstance(data, (int, float)) or isinstance(data, bool) or not abs(data) <= LARGEST:
        _refuse(where, str(data)[:40], f"a number up to {LARGEST:g}")
    return float(data)


def _numbers(data: Any, where: str, low: int, high: int) -> tuple[float, ...]:
    return tuple(_number(value, where) for value in _list(data, where, low, high))


def _levels(data: Any, where: str, low: int, high: int) -> tuple[float, ...]:
    levels = _numbers(data, where, low, high)
    if not all(level >= 1 / LARGEST for level in levels):
        _refuse(where, list(levels), "positive noise levels")
    return levels


def _size(data: Any, where: str, low: int) -> int:
    if not isinstance(data, int) or isinstance(data, bool) or not low <= data <= MAX_SIZE:
        _refuse(where, str(data)[:40], f"a whole number from {low} to {MAX_SIZE}")
    return data


def _sizes(data: Any, where: str, low: int, high: int, *, least: int = 1) -> tuple[int, ...]:
    return tuple(_size(value, where, least) for value in _list(data, where, low, high))


def _flag(data: Any, where: str) -> bool:
    if not isinstance(data, bool):
        _refuse(where, str(data)[:40], "true or false")
    return data


def _text(data: Any, where: str) -> str:
    if not isinstance(data, str) or len(data) > 1000:
        _refuse(where, type(data).__name__, "text of at most 1000 characters")
    return data


def _refuse(where: str, got: Any, expected: str) -> NoReturn:
    raise FileFormatError(f"{where}: got {str(got)[:120]}, expected {expected}; write the plan again with `amed export`")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("an object names an entry twice")
    return data
