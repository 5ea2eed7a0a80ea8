"""Programs written down for other stacks as tables: numbers alone, but for the weights of an AMED predictor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from amed_engine.engine.export.expression import Expression, NoExpression
from amed_engine.engine.export.read_plan import loads
from amed_engine.engine.export.strict_json import MAX_BYTES, hashed
from amed_engine.engine.export.tableau import (
    BASIS,
    MAX_COLUMNS,
    MAX_ROWS,
    Coefficient,
    Evaluation,
    MeanRows,
    PredictorWeights,
    Tableau,
    basis_at,
)
from amed_engine.engine.model import Model
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import mean_of_labels
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.solvers import SOLVERS, alternatives
from amed_engine.solvers.files import write_or_stream
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program, Walk
from amed_engine.solvers.rules import midpoint_level
from amed_engine.solvers.stage import Midpoint, Update


@runtime_checkable
class Planned(Protocol):
    """What a Sampler, and a job of exporting one, knows."""

    @property
    def plan(self) -> Plan: ...
    @property
    def program(self) -> Program: ...
    @property
    def model(self) -> Model: ...


def write_plan(source: Planned | Program, path: str | os.PathLike, *, freeze: bool = False) -> Tableau:
    """Write a sampler's program as JSON, for `Stepper`, the C API or CuPy; the table written.

    freeze: ask the predictor once, with features of zero, and write its answers as constants. Otherwise a predictor goes
    along with its weights, for solvers whose steps need no more than `BASIS` (`Solver.tabulated`). Raises ConfigError.
    """
    plan = make_tableau(source, freeze=freeze)
    write_or_stream(path, _text(plan).encode())
    return plan


def _text(tableau: Tableau) -> str:
    return json.dumps(hashed(tableau.to_json()), allow_nan=False) + "\n"


def make_tableau(source: Planned | Program, *, freeze: bool = False) -> Tableau:
    """The table of a sampler or a program; see `write_plan`."""
    program, plan = resolve_program(source)
    if freeze:
        program = program.frozen()
    shape = None if isinstance(source, Program) else source.model.shape
    tableau = Tableau(
        sigmas=tuple(program.sigmas.double().tolist()),
        evaluations=tuple(evaluations(program)),
        shape=shape if program.mean is None else tuple(program.mean.shape[1:]),
        description="" if plan is None else plan.describe(),
        guidance_scale=None if plan is None else plan.guidance_scale,
        predictor=_weights(program.predictor) if program.updates is None else None,
        mean=None if program.mean is None else _mean(program.mean, plan),
    )
    _check_readable(tableau)
    return tableau


def _check_readable(tableau: Tableau) -> None:
    """Readers are strict; a table beyond what they take is refused here, where something else can be chosen."""
    try:
        loads(text := _text(tableau))
    except ValueError as error:  # a FileFormatError, or a NaN, which JSON does not have
        raise ConfigError(f"no reader of plans would take this one: {error}") from error
    if len(text) > MAX_BYTES:
        raise ConfigError(f"this plan has {len(text)} bytes, more than the {MAX_BYTES} that are read; pass freeze=True")


# ---- the program ----

# Of a program that is not all there is to a sample.
ADDS_NOISE = "this solver adds fresh noise between its evaluations"
DRAW_HERE = "sample with Sampler, write a single evaluation (nfe=1), which adds none, or use another solver"


def resolve_program(source: Planned | Program) -> tuple[Program, Plan | None]:
    """The program with float64 constants on the host, and the plan it came from. Raises ConfigError for what is no table."""
    if not isinstance(source, Program | Planned):
        raise ConfigError(f"a plan is made of a Sampler or a Program, got {type(source).__name__}")
    plan = None if isinstance(source, Program) else source.plan
    program = source if isinstance(source, Program) else source.plan.program(source.program.predictor)
    if program.noises:
        raise ConfigError(f"{ADDS_NOISE}, and a table has no place for it; {DRAW_HERE}")
    if isinstance(program.predictor, Sequence) and any(callable(choice) for choice in program.predictor):
        raise ConfigError("coefficients that depend on the sample are no table; export format='pt2' or 'onnx'")
    return program, plan


def evaluations(program: Program) -> Iterator[Evaluation]:
    learned, sigmas, last_is_anchor = program.updates is None, program.sigmas.tolist(), True
    for i, s, sigma, sigma_net, update in program.evaluations(_learned_updates(program) if learned else None):
        levels: dict[str, Any] = {"sigma": _told(sigma), "sigma_net": _told(sigma_net)}
        if update is None:  # D itself is the sample, not thresholded
            columns = (1,) if last_is_anchor else (2,)
            yield Evaluation(**levels, columns=columns, coefficients=((1.0,),), **_NOTHING_MOVES)
            return
        last_is_anchor = update.x_is_y
        yield Evaluation(
            **levels,
            columns=update.columns,
            coefficients=_numbers(update.coeffs),
            new_directions=update.new_directions,
            keep=update.keep,
            moves_x=update.moves_x,
            x_is_y=update.x_is_y,
            analytic=bool(program.afs) and i == s == 0,
            threshold=program.solver.thresholds,
            predict=(sigmas[i], sigmas[i + 1]) if learned and s == 0 else None,
        )


_NOTHING_MOVES: dict[str, Any] = {"new_directions": 0, "keep": 0, "moves_x": False, "x_is_y": False}


def _told(levels: Sequence[Any]) -> tuple[float, ...] | None:
    """Numbers, or None for what a predictor says."""
    numbers: list[Any] = [level.number if isinstance(level, Expression) else level for level in levels]
    return None if any(number is None for number in numbers) else tuple(map(float, numbers))


def _numbers(coeffs: Tensor | list) -> tuple[tuple[Coefficient, ...], ...]:
    matrix = coeffs[..., 0].double().tolist() if isinstance(coeffs, Tensor) else coeffs
    rows, columns = len(matrix), len(matrix[0])
    if rows > MAX_ROWS or columns > MAX_COLUMNS:
        raise ConfigError(f"one update has {rows} x {columns} coefficients, a plan at most {MAX_ROWS} x {MAX_COLUMNS}")
    return tuple(tuple(row) for row in matrix)


def _mean(rows: Tensor, plan: Plan | None) -> MeanRows:
    """rows (R, ...) with the plan's guidance applied. A program without a plan does not say for how many classes: one a row."""
    rows, count = rows.float().cpu(), len(rows) - 1
    if count:
        scale = None if plan is None else plan.guidance_scale
        rows = torch.cat([rows[:1], mean_of_labels(rows, torch.eye(count, device="cpu"), scale)])
    classes = count if plan is None or plan.mean is None else plan.mean.classes
    return MeanRows.of(classes, rows.flatten(1).tolist())


# ---- learned coefficients ----


def _learned_updates(program: Program) -> Iterator[list[Update]]:
    """Per interval its updates, coefficients as weights on BASIS: the solver is asked with symbols for what the predictor will
    say. Refused where its coefficients are something else (logarithms, earlier midpoints)."""
    _check_weights(program.predictor)
    sigmas = [Expression.of(Fraction(sigma)) for sigma in program.sigmas.tolist()]
    walk = Walk(program, sigmas, stack=lambda matrix, like: matrix)
    r, c, time = map(Expression.symbol, ("r", "c", "time"))
    for i in range(program.intervals):
        m: Any = midpoint_level(sigmas[i], sigmas[i + 1], r)
        basis = basis_at(Expression.of(1), m, r, c)
        try:
            updates = walk.updates(i, Midpoint(r, c, time))
            written = [[[Expression.of(entry).over(basis) for entry in row] for row in u.coeffs] for u in updates]
        except NoExpression as error:
            tabulated = sorted(name for name, solver in SOLVERS.items() if solver.tabulated)
            raise ConfigError(
                f"the coefficients of {type(program.solver).__name__} under a predictor are no combination of "
                f"{', '.join(BASIS)}; use {alternatives(tabulated)}, or pass freeze=True"
            ) from error
        yield [update._replace(coeffs=matrix) for update, matrix in zip(updates, written, strict=True)]  # type: ignore[arg-type]


def _check_weights(predictor: Any) -> None:
    if not isinstance(predictor, AMEDPredictor):
        raise ConfigError(
            "only an AMEDPredictor goes into a plan with its weights; pass freeze=True for its answers alone"
        )
    if predictor.scales != "bounded":
        raise ConfigError(
            f"a plan cannot say {predictor.scales!r} scales; pass freeze=True for the predictor's answers alone, or "
            "export format='pt2' or 'onnx'"
        )


def _weights(predictor: Any) -> PredictorWeights:
    state = {name: value.detach().double().cpu().flatten() for name, value in predictor.state_dict().items()}
    return PredictorWeights(
        scale_dir=predictor.scale_dir,
        scale_time=predictor.scale_time,
        bottleneck=predictor.bottleneck,
        hidden=predictor.hidden_dim,
        encoded=predictor.bottleneck_dim,
        noise_channels=predictor.embedding_dim,
        frequencies=tuple(predictor.frequencies.double().tolist()),
        parameters={name: tuple(value.tolist()) for name, value in state.items()},
    )
