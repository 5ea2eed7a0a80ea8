"""The table of noise levels that diffusers' schedulers take, written as JSON; `read_schedule` reads it back."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from amed_engine.engine.export.read_schedule import FORMAT, VERSION
from amed_engine.engine.export.strict_json import hashed
from amed_engine.engine.export.write_plan import Planned, evaluations, resolve_program
from amed_engine.errors import ConfigError
from amed_engine.solvers.files import write_json
from amed_engine.solvers.program import Program
from amed_engine.solvers.schedule import DiscreteTime
from amed_engine.solvers.stage import Midpoint, Row


def write_schedule(source: Planned | Program, path: str | os.PathLike, *, alphas_cumprod: Tensor | None = None) -> dict:
    """Write the noise levels of every evaluation as JSON, the form in which diffusers' schedulers take a schedule.

    sigmas: level of each evaluation in order, then the last level; timesteps: the same as a network is told them,
    log(sigma) / 4 (EDM), or with alphas_cumprod the discrete-time model's number of steps, counted from 0; scale_dir,
    scale_time: of every interval, 1 without a predictor; sha256: of the other entries, compared where they are read again. A
    predictor is asked once, with features of zero. The table written.
    """
    program, plan = resolve_program(source)
    if program.mean is not None:
        raise ConfigError(
            "a schedule cannot carry the mean answer that the first step starts about; export format='plan', or make the "
            "sampler with afs=False or True"
        )
    program = program.frozen()
    table = {
        "format": FORMAT,
        "version": VERSION,
        "description": "" if plan is None else plan.describe(),
        "timestep_type": "log_sigma" if alphas_cumprod is None else "discrete",
        **_levels(program, alphas_cumprod),
    }
    try:
        table = hashed(table)
        write_json(path, table, streams=True)
    except ValueError as error:
        raise ConfigError("the predictor says NaN or infinite numbers; train it again, or pass another") from error
    return table


def _levels(program: Program, alphas_cumprod: Tensor | None) -> dict[str, list]:
    steps = list(evaluations(program))
    if any(e.points > 1 for e in steps):
        raise ConfigError("a schedule has one noise level per evaluation, not parallel points; export format='plan'")
    last = program.sigmas[-1:].double()
    own, told = (
        torch.cat([torch.tensor([getattr(e, name)[0] for e in steps], dtype=torch.float64, device="cpu"), last])
        for name in ("sigma", "sigma_net")
    )
    midpoints: Any = program.predictor or [Midpoint(1.0)] * program.intervals
    if isinstance(midpoints[0], Row):
        raise ConfigError(
            "a schedule cannot say the coefficients of 'nonstationary'; export format='plan', or name another solver"
        )
    times = told.log() / 4 if alphas_cumprod is None else _discrete(told, alphas_cumprod)
    scales = {name: [float(getattr(mid, name)) for mid in midpoints] for name in ("scale_dir", "scale_time")}
    return {"sigmas": own.tolist(), "timesteps": times.tolist(), **scales, "afs": [e.analytic for e in steps]}


def _discrete(sigma: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Time runs over (k + 1) / n; diffusers counts steps from 0."""
    return DiscreteTime.of(alphas_cumprod).time(sigma) * len(alphas_cumprod) - 1
