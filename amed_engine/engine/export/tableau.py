"""A program as numbers: per evaluation the noise levels and one small matrix. No torch in sight.

A state is an anchor x, evaluation points y_1 .. y_K and past directions d_1, d_2, ... (newest first); it starts with
x = y_1 and no direction. An `Evaluation` with denoised D_1 .. D_K at the points takes it to

    [new directions, x, y] = C [columns of (x, y_1 .. y_K unless y is x, D_1 .. D_K, d_1, d_2, ...)]

and the last y is the sample. A coefficient of C is a number, or eight weights on `BASIS`: what an AMED predictor said.
As JSON an object with the fields of `Tableau` and format, version and nfe; version 1 has no `mean`, and means zero. In a file
`sha256` may follow, the hash of the rest (`hashed` in strict_json.py).
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from amed_engine.errors import FileFormatError

FORMAT, VERSION = "amed_plan", 2
# With r, c = scale_dir and m = sigma_next^r · sigma^(1-r) of the interval, in this order.
BASIS = ("1", "m", "1/m", "c", "c·m", "c/m", "c/r", "c/(r·m)")


def basis_at(one: Any, m: Any, r: Any, c: Any) -> tuple:
    """`BASIS` of numbers, arrays or symbols; one: a 1 of their kind."""
    return (one, m, 1 / m, c, c * m, c / m, c / r, c / (r * m))


MAX_ROWS, MAX_COLUMNS = 8, 16  # of one `combine`
MAX_MEAN = 1 << 20  # numbers of all rows of a `MeanRows`

Coefficient = float | tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation and what follows.

    sigma, sigma_net: noise level of each point, and the one told to the network; None for the predictor's midpoint m,
    told as scale_time·m. columns, coefficients: the matrix, rows by columns. new_directions: how many of its rows are
    directions; 0 where the denoised data are themselves. keep: directions kept afterwards. moves_x: a row is the new
    anchor, unless x_is_y. analytic: no network, D = x - c·(x - m) with c = s / sqrt(1 + s²), m the sample's row of the table's
    `mean` or 0. threshold: D is thresholded dynamically.
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
        return {
            f"{n}.{kind}": s if kind == "weight" else s[:1] for n, s in layers.items() for kind in ("weight", "bias")
        }


@dataclass(frozen=True)
class MeanRows:
    """The mean of the data for an analytic first evaluation, guidance applied.

    classes: K of the network, 0 where the mean is the same for every sample. rows: float32, each a sample flattened in C
    order: one for K = 0; else first that of samples without a class, then one for each class, or one for any of them.
    """

    classes: int
    rows: tuple[array, ...] = field(repr=False)

    @classmethod
    def of(cls, classes: int, rows: Iterable[Iterable[float]]) -> MeanRows:
        return cls(classes, tuple(array("f", row) for row in rows))

    def to_json(self) -> dict:
        return {"classes": self.classes, "rows": [[_shortest(value) for value in row] for row in self.rows]}


def _shortest(value: float) -> float:
    """The number of fewest digits, from 6 on, that float32 rounds to the value."""
    shorter = (float(f"{value:.{digits}g}") for digits in range(6, 9))
    return next((number for number in shorter if array("f", [number])[0] == value), float(f"{value:.9g}"))


@dataclass(frozen=True)
class Tableau:
    """Everything a host needs but the network. sigmas: noise levels of the intervals; latents of unit variance are to be
    multiplied by the first. shape: of one sample, None for any. description: for people."""

    sigmas: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    shape: tuple[int, ...] | None = None
    description: str = ""
    guidance_scale: float | None = None
    predictor: PredictorWeights | None = None
    mean: MeanRows | None = None

    def __repr__(self) -> str:
        """One line: the numbers are thousands where there is a predictor."""
        shape = "" if self.shape is None else f", shape {self.shape}"
        return f"Tableau({self.description or f'NFE {self.nfe}'}{shape})"

    @property
    def nfe(self) -> int:
        """Network evaluations per sample; parallel points count one each."""
        return sum(0 if e.analytic else e.points for e in self.evaluations)

    def to_json(self) -> dict:
        mean = self.mean and self.mean.to_json()
        return {"format": FORMAT, "version": VERSION, "nfe": self.nfe, **asdict(self), "mean": mean}

    def dumps(self) -> str:
        return json.dumps(self.to_json(), allow_nan=False) + "\n"


# ---- what the evaluations mean together ----


def check(plan: Tableau) -> None:
    """Walk through the evaluations: every column exists, every row has a meaning. Raises FileFormatError."""
    past, y_is_x, predicted = 0, True, False
    if plan.evaluations[0].points != 1:
        refuse("evaluations[0].sigma", plan.evaluations[0].sigma, "one point to begin with")
    for i, e in enumerate(plan.evaluations):
        where = f"evaluations[{i}]"
        size = 1 + e.points * (1 if y_is_x else 2) + past
        _check_matrix(e, size, where)
        available = (e.new_directions or e.points) + past
        if e.new_directions > e.points or e.keep > available or (e.new_directions and e.keep < e.new_directions):
            refuse(f"{where}.keep", f"{e.keep} with {e.new_directions} new", f"at most {available} directions to exist")
        predicted = predicted or e.predict is not None
        if (e.learned or e.sigma is None or e.predict) and (plan.predictor is None or not predicted):
            refuse(where, "a coefficient or level of a predictor", "numbers, since none has spoken yet")
        following = plan.evaluations[i + 1].points if i + 1 < len(plan.evaluations) else 1
        if e.next_points != following:
            refuse(f"{where}.coefficients", f"{e.next_points} points", f"{following}, as follow")
        past, y_is_x = e.keep, e.x_is_y
    if plan.mean is not None:
        _check_mean(plan, plan.mean)


def _check_mean(plan: Tableau, mean: MeanRows) -> None:
    if [i for i, e in enumerate(plan.evaluations) if e.analytic] != [0]:
        refuse(
            "mean", "the mean of an analytic evaluation", "null, unless the first evaluation and no other is analytic"
        )
    if len(mean.rows) not in ({1 + mean.classes, 2} if mean.classes else {1}):
        refuse("mean.rows", f"{len(mean.rows)} rows for {mean.classes} classes", "1 without classes, 1 + classes, or 2")
    size = None if plan.shape is None else math.prod(plan.shape)
    if any(len(row) != size for row in mean.rows):
        refuse(
            "mean.rows", f"rows of {sorted({len(row) for row in mean.rows})} numbers", f"{size}, the product of shape"
        )
    if len(mean.rows) * len(mean.rows[0]) > MAX_MEAN:
        refuse("mean.rows", f"{len(mean.rows)} of {size} numbers", f"at most {MAX_MEAN} numbers in all")


def _check_matrix(e: Evaluation, size: int, where: str) -> None:
    if list(e.columns) != sorted(set(e.columns)) or not 0 <= e.columns[0] <= e.columns[-1] < size:
        refuse(f"{where}.columns", list(e.columns), f"increasing numbers from 0 to {size - 1}")
    if e.next_points < 1 or (e.x_is_y and e.next_points != 1):
        refuse(f"{where}.coefficients", f"{len(e.coefficients)} rows", "one for every direction, anchor and point")
    if e.x_is_y and not e.moves_x:
        refuse(f"{where}.x_is_y", "true", "false, where the anchor does not move")
    if any(len(row) != len(e.columns) for row in e.coefficients):
        refuse(f"{where}.coefficients", [len(row) for row in e.coefficients], f"{len(e.columns)} in each row")
    if (e.analytic or e.predict is not None) and (e.points != 1 or e.sigma is None):
        refuse(f"{where}.sigma", e.sigma, "one noise level, for a first evaluation")


def refuse(where: str, got: Any, expected: str) -> NoReturn:
    """Raises FileFormatError for the entry `where`."""
    raise FileFormatError(
        f"{where}: got {str(got)[:120]}, expected {expected}; write the plan again with `amed export`"
    )
