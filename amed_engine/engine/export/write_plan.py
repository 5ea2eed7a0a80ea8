"""Programs written down for other stacks as tables: numbers alone, but for the weights of an AMED predictor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from amed_engine.checkpoints import atomic_write
from amed_engine.engine.export.read_plan import loads
from amed_engine.engine.export.strict_json import MAX_BYTES
from amed_engine.engine.export.tableau import (
    BASIS,
    MAX_COLUMNS,
    MAX_ROWS,
    Coefficient,
    Evaluation,
    PredictorWeights,
    Tableau,
)
from amed_engine.engine.model import Model
from amed_engine.errors import ConfigError
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.solvers import SOLVERS
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program, Walk
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


# Midpoints on which learned coefficients are measured.
_SAMPLES = 64


def write_plan(source: Planned | Program, path: str | os.PathLike, *, freeze: bool = False) -> Tableau:
    """Write a sampler's program as JSON, for `Stepper`, the C API or CuPy; the table written.

    freeze: ask the predictor once, with features of zero, and write its answers as constants. Otherwise a predictor goes
    along with its weights, for solvers whose steps need no more than `BASIS` (`Solver.tabulated`). Raises ConfigError.
    """
    plan = make_tableau(source, freeze=freeze)
    atomic_write(path, plan.dumps().encode())
    return plan


def make_tableau(source: Planned | Program, *, freeze: bool = False) -> Tableau:
    """The table of a sampler or a program; see `write_plan`."""
    program, plan = resolve_program(source)
    _check_adaptive(program)
    if freeze:
        program = frozen(program)
    tableau = Tableau(
        sigmas=tuple(program.sigmas.double().tolist()),
        evaluations=tuple(evaluations(program)),
        shape=None if isinstance(source, Program) else source.model.shape,
        description="" if plan is None else plan.describe(),
        guidance_scale=None if plan is None else plan.guidance_scale,
        predictor=_weights(program.predictor) if program.updates is None else None,
    )
    _check_readable(tableau)
    return tableau


def _check_readable(tableau: Tableau) -> None:
    """Readers are strict; a table beyond what they take is refused here, where something else can be chosen."""
    try:
        loads(text := tableau.dumps())
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
    return source.plan.program(source.program.predictor), source.plan


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
        raise ConfigError("coefficients that depend on the sample are no table; export format='pt2' or 'onnx'")


def _device(predictor: Any) -> torch.device:
    parameters = predictor.parameters() if isinstance(predictor, torch.nn.Module) else ()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def evaluations(program: Program) -> Iterator[Evaluation]:
    for i, folded in enumerate(_folded(program)):
        told: tuple[float, ...] | None = (float(program.sigmas[i]),)
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
                predict=_interval(program, i) if program.updates is None and s == 0 else None,
            )
            level, told = _told(update.sigma), _told(update.sigma_net)
    if program.denoise_to_zero:
        yield _last(program)


def _interval(program: Program, i: int) -> tuple[float, float]:
    return float(program.sigmas[i]), float(program.sigmas[i + 1])


def _last(program: Program) -> Evaluation:
    """The evaluation at the last level whose D, not thresholded, is the sample."""
    last = program.updates[-1][-1] if program.updates else None
    level = (float(program.sigmas[-1]),)
    column = 1 if last is None or last.x_is_y else 2
    return Evaluation(level, level, (column,), ((1.0,),), 0, 0, moves_x=False, x_is_y=False)


def _told(levels: tuple[Tensor, ...] | None) -> tuple[float, ...] | None:
    """Numbers, or None for what a predictor says: measured on many midpoints, a level of its own for each."""
    if levels is None or any(level.numel() > 1 for level in levels):
        return None
    return tuple(float(level) for level in levels)


Numbers = tuple[tuple[Coefficient, ...], ...]


def _folded(program: Program) -> Iterator[list[tuple[Update, Numbers]]]:
    """Per interval its updates with their coefficients."""
    if program.updates is None:
        yield from _learned_updates(program)
        return
    for updates in program.updates:
        yield [(update, _numbers(update.coeffs)) for update in updates]


def _numbers(coeffs: Tensor) -> Numbers:
    _check_size(coeffs.shape)
    return tuple(tuple(row) for row in coeffs[..., 0].double().tolist())


def _check_size(shape: Sequence[int]) -> None:
    if shape[0] > MAX_ROWS or shape[1] > MAX_COLUMNS:
        raise ConfigError(
            f"one update has {shape[0]} x {shape[1]} coefficients, a plan at most {MAX_ROWS} x {MAX_COLUMNS}"
        )


# ---- learned coefficients ----


def _learned_updates(program: Program) -> Iterator[list[tuple[Update, Numbers]]]:
    """Per interval (update, weights on BASIS): measured on random midpoints, so that any solver may ask, and those whose
    coefficients are something else (logarithms, earlier midpoints) are refused."""
    if not isinstance(program.predictor, AMEDPredictor):
        raise ConfigError(
            "only an AMEDPredictor goes into a plan with its weights; pass freeze=True for its answers alone"
        )
    if program.predictor.scales != "bounded":
        raise ConfigError(
            f"a plan cannot say {program.predictor.scales!r} scales; pass freeze=True for the predictor's answers alone, or "
            "export format='pt2' or 'onnx'"
        )
    generator = torch.Generator().manual_seed(0)
    walk = Walk(program, program.sigmas.double().cpu())
    for i in range(program.intervals):
        r, c, time = torch.rand(3, _SAMPLES, generator=generator, dtype=torch.float64) * 0.9 + 0.05
        midpoint = Midpoint(r, c + 0.5, time + 0.5)
        sigma, sigma_next = _interval(program, i)
        basis = _basis(midpoint, sigma_next**r * sigma ** (1 - r))
        yield [(update, _fit(update.coeffs, basis, program)) for update in walk.updates(i, midpoint)]


def _basis(midpoint: Midpoint, m: Tensor) -> Tensor:
    """BASIS, (samples, 8)."""
    r, c = torch.as_tensor(midpoint.r), torch.as_tensor(midpoint.scale_dir)
    return torch.stack([torch.ones_like(m), m, 1 / m, c, c * m, c / m, c / r, c / (r * m)], dim=1)


def _fit(coeffs: Tensor, basis: Tensor, program: Program) -> Numbers:
    _check_size(coeffs.shape)
    return tuple(tuple(_weights_of(values, basis, program) for values in row) for row in coeffs)


def _weights_of(values: Tensor, basis: Tensor, program: Program) -> Coefficient:
    """One coefficient on all samples as weights: first on every function, then on those that matter."""
    if bool((values == values[0]).all()):
        return float(values[0])
    norms, largest = basis.abs().amax(0), float(values.abs().max())
    support = torch.arange(len(BASIS))
    for _ in range(2):
        scaled = basis[:, support] / norms[support]
        found = torch.linalg.lstsq(scaled, values[:, None], driver="gelsd").solution[:, 0]
        misfit = float((scaled @ found - values).abs().max())
        support, found = support[found.abs() > 1e-8 * largest], found[found.abs() > 1e-8 * largest]
    if misfit > 1e-9 * largest:
        raise ConfigError(
            f"the coefficients of {type(program.solver).__name__} under a predictor are no combination of {', '.join(BASIS)}; "
            f"use {', '.join(name for name in SOLVERS if SOLVERS[name].tabulated)}, or pass freeze=True"
        )
    weights = torch.zeros(len(BASIS), dtype=torch.float64)
    weights[support] = found / norms[support]
    return tuple(weights.tolist())


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
