"""Programs written down for other stacks as static plans: numbers alone, but for the weights of an AMED predictor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from amed_engine.checkpoints import atomic_write
from amed_engine.errors import ConfigError
from amed_engine.expression import Expression
from amed_engine.loop import Program, Walk
from amed_engine.models import Model
from amed_engine.plan import Plan
from amed_engine.plan_file import MAX_BYTES, loads
from amed_engine.predictor import AMEDPredictor
from amed_engine.program import Midpoint, Update, fold
from amed_engine.rules import midpoint_level
from amed_engine.static_plan import (
    BASIS,
    MAX_COLUMNS,
    MAX_ROWS,
    Coefficient,
    Evaluation,
    PredictorWeights,
    StaticPlan,
)


@runtime_checkable
class Planned(Protocol):
    """What a Sampler, and a job of exporting one, knows."""

    @property
    def plan(self) -> Plan: ...
    @property
    def program(self) -> Program: ...
    @property
    def model(self) -> Model: ...


def write_plan(source: Planned | Program, path: str | os.PathLike, *, freeze: bool = False) -> StaticPlan:
    """Write a sampler's program as JSON, for `Stepper`, the C API or CuPy; the plan written.

    freeze: ask the predictor once, with features of zero, and write its answers as constants. Otherwise a predictor goes
    along with its weights, for solvers whose steps need no more than `BASIS` (amed, dpm, euler, ipndm). Raises ConfigError.
    """
    plan = make_static_plan(source, freeze=freeze)
    atomic_write(path, plan.dumps().encode())
    return plan


def make_static_plan(source: Planned | Program, *, freeze: bool = False) -> StaticPlan:
    """The static plan of a sampler or a program; see `write_plan`."""
    program, plan = resolve_program(source)
    _check_adaptive(program)
    if freeze:
        program = frozen(program)
    static = StaticPlan(
        sigmas=tuple(program.sigmas.double().tolist()),
        evaluations=tuple(evaluations(program)),
        shape=None if isinstance(source, Program) else source.model.shape,
        description="" if plan is None else plan.describe(),
        guidance_scale=None if plan is None else plan.guidance_scale,
        predictor=_weights(program.predictor) if program.updates is None else None,
    )
    _check_readable(static)
    return static


def _check_readable(static: StaticPlan) -> None:
    """Readers are strict; a plan beyond what they take is refused here, where something else can be chosen."""
    try:
        loads(text := static.dumps())
    except ValueError as error:  # a FileFormatError, or a NaN, which JSON does not have
        raise ConfigError(f"no reader of plans would take this one: {error}") from error
    if len(text) > MAX_BYTES:
        raise ConfigError(f"this plan has {len(text)} bytes, more than the {MAX_BYTES} that are read; pass freeze=True")


# ---- the program ----


def resolve_program(source: Planned | Program) -> tuple[Program, Plan | None]:
    """The program with float64 constants on the host, and the plan it came from."""
    if isinstance(source, Program):
        return source, None
    if not isinstance(source, Planned):
        raise ConfigError(f"a plan is made of a Sampler or a Program, got {type(source).__name__}")
    plan, predictor = source.plan, source.program.predictor
    options = {"afs": plan.afs, "denoise_to_zero": plan.denoise_to_zero}
    return Program.build(plan.make_solver(), plan.levels, predictor, **options), plan


def frozen(program: Program) -> Program:
    """The program with what its predictor says to features of zero in place of the predictor."""
    if program.updates is not None:
        return program
    _check_adaptive(program)
    predictor, sigmas = program.predictor, program.sigmas.double()
    if isinstance(predictor, Sequence):
        said = list(predictor)  # numbers already, but ones that were being trained
    else:
        levels = sigmas.to(_device(predictor)).unsqueeze(1)
        with torch.no_grad():
            said = [predictor(None, levels[i], levels[i + 1]) for i in range(program.intervals)]  # type: ignore[misc]
    midpoints: list[Midpoint] = []
    for mid in said:
        fields = (torch.as_tensor(field, dtype=torch.float64).detach().squeeze() for field in mid)  # type: ignore[union-attr]
        midpoints.append(Midpoint(*fields))
    return Program.build(
        program.solver, sigmas.cpu(), midpoints, afs=program.afs, denoise_to_zero=program.denoise_to_zero
    )


def _check_adaptive(program: Program) -> None:
    predictor = program.predictor
    if isinstance(predictor, Sequence) and any(callable(choice) for choice in predictor):
        raise ConfigError("coefficients that depend on the sample are no static plan; export format='pt2' or 'onnx'")


def _device(predictor: Any) -> torch.device:
    parameters = predictor.parameters() if isinstance(predictor, torch.nn.Module) else ()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def evaluations(program: Program) -> Iterator[Evaluation]:
    sigmas = program.sigmas.tolist()
    for i, folded in enumerate(_folded(program)):
        told: tuple[float, ...] | None = (sigmas[i],)
        level = told
        for s, (update, coefficients) in enumerate(folded):
            yield Evaluation(
                sigma=level,
                sigma_net=told,
                columns=update.columns,
                coefficients=coefficients,
                new_directions=update.new_directions,
                keep=update.keep,
                moves_x=update.moves_x,
                x_is_y=update.x_is_y,
                analytic=program.afs and i == s == 0,
                threshold=program.solver.thresholds,
                predict=(sigmas[i], sigmas[i + 1]) if program.updates is None and s == 0 else None,
            )
            level, told = _told(update.sigma), _told(update.sigma_net)
    if program.denoise_to_zero:
        yield _last(program)


def _last(program: Program) -> Evaluation:
    """The evaluation at the last level whose D, not thresholded, is the sample."""
    last = program.updates[-1][-1] if program.updates else None
    level = (float(program.sigmas[-1]),)
    column = 1 if last is None or last.x_is_y else 2
    return Evaluation(level, level, (column,), ((1.0,),), 0, 0, moves_x=False, x_is_y=False)


def _told(levels: tuple[Any, ...] | None) -> tuple[float, ...] | None:
    """Numbers, or None for what a predictor says."""
    if levels is None or any(isinstance(level, Expression) for level in levels):
        return None
    return tuple(float(level) for level in levels)


Numbers = tuple[tuple[Coefficient, ...], ...]


def _folded(program: Program) -> Iterator[list[tuple[Update, Numbers]]]:
    """Per interval its updates with their coefficients."""
    if program.updates is None:
        return _learned_updates(program)
    return ([(u, _numbers(u.coeffs[..., 0].double().tolist())) for u in updates] for updates in program.updates)


def _numbers(matrix: Sequence[Sequence[Coefficient]]) -> Numbers:
    rows, columns = len(matrix), len(matrix[0])
    if rows > MAX_ROWS or columns > MAX_COLUMNS:
        raise ConfigError(f"one update has {rows} x {columns} coefficients, a plan at most {MAX_ROWS} x {MAX_COLUMNS}")
    return tuple(tuple(row) for row in matrix)


# ---- learned coefficients ----


def _learned_updates(program: Program) -> Iterator[list[tuple[Update, Numbers]]]:
    """Per interval (update, weights on BASIS): the solver is asked with symbols for what the predictor will say. Refused where
    its coefficients are something else (logarithms, earlier midpoints)."""
    if not isinstance(program.predictor, AMEDPredictor):
        raise ConfigError(
            "only an AMEDPredictor goes into a plan with its weights; pass freeze=True for its answers alone"
        )
    if program.predictor.scales != "bounded":
        raise ConfigError(
            f"a plan cannot say {program.predictor.scales!r} scales; pass freeze=True for the predictor's answers alone, or "
            "export format='pt2' or 'onnx'"
        )
    sigmas: list[Any] = [Fraction(sigma) for sigma in program.sigmas.tolist()]
    walk = Walk(program, sigmas, partial(fold, stack=lambda matrix, like: matrix))
    r, c, time = map(Expression.symbol, ("r", "c", "time"))
    for i in range(program.intervals):
        m: Any = midpoint_level(sigmas[i], sigmas[i + 1], r)
        basis = (Expression.of(1), m, 1 / m, c, c * m, c / m, c / r, c / (r * m))
        try:
            updates = walk.updates(i, Midpoint(r, c, time))
            written = [[[Expression.of(entry).over(basis) for entry in row] for row in u.coeffs] for u in updates]
        except (AttributeError, TypeError) as error:
            raise ConfigError(
                f"the coefficients of {type(program.solver).__name__} under a predictor are no combination of "
                f"{', '.join(BASIS)}; use amed, dpm, euler or ipndm, or pass freeze=True"
            ) from error
        yield [(update, _numbers(matrix)) for update, matrix in zip(updates, written, strict=True)]


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
