"""Noise levels for a training-free solver, by dynamic programming over the errors of single steps.

A teacher's trajectory on many levels is the truth. The cost of going from one of its states to another in one step is
the error made there, and the cheapest path of as many steps as the evaluations allow is the schedule:

    c(i, j) = mean over latents and values of (step(x_i, sigma_i -> sigma_j) - x_j)²,   i < j
    V(j, 1) = c(j, last),   V(j, k) = min over i > j of c(j, i) + coefficient · V(i, k - 1)

Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling" (arXiv:2405.11326). No gradient and no
training: the teacher's evaluations are all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from amed_engine.engine.measure import measured
from amed_engine.engine.notices import tell_of_zero
from amed_engine.engine.resolve import resolve
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, Denoiser, as_denoised, known_first
from amed_engine.sampling.loop import integrate
from amed_engine.sampling.modes import leaving_modes
from amed_engine.solvers import alternatives, integrator_names, make_solver
from amed_engine.solvers.arguments import in_range
from amed_engine.solvers.base import Solver
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.plan import Plan, make_plan
from amed_engine.solvers.program import Program
from amed_engine.solvers.schedule import check_sigmas, make_schedule
from amed_engine.training.batches import Batches, Conditions, first_answer
from amed_engine.training.presets import TEACHER, noise_range

logger = logging.getLogger("amed_engine")

COSTS = ("euler", "solver")
COEFFICIENT = 1.15  # the paper's for pixels; 1.2 for Stable Diffusion


@leaving_modes
def search_schedule(
    model: Any,
    *,
    nfe: int = 5,
    solver: str = "ipndm",
    solver_options: Mapping[str, Any] | None = None,
    afs: FirstStep | None = None,
    cost: str = "euler",
    coefficient: float = COEFFICIENT,
    grid: int | Tensor = 61,
    samples: int = 128,
    batch: int = 64,
    seed: int = 0,
    conditions: Conditions = None,
    guidance_scale: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shape: tuple[int, ...] | None = None,
    label_dim: int | None = None,
    progress: bool = True,
) -> Tensor:
    """The noise levels on which a training-free solver spends `nfe` evaluations with the least error, found in seconds.

    model, sigma_min, sigma_max, shape, label_dim, solver, solver_options, nfe, afs: as `Sampler` takes them; with
    `Sampler(model, solver=solver, nfe=nfe, schedule=levels)` the levels cost what was asked. An analytic first step is
    taken into account as one. cost: "euler", the paper's, for any solver, no evaluation but the teacher's; "solver", the
    error of the solver's own step, for those without a memory, as heun. coefficient: what an error is worth more with
    every step that precedes it. grid: from how many levels to choose, spaced as `polynomial` spaces them, or the levels
    themselves, both ends included. samples: latents, drawn by `seed` in whole batches; the global generators are
    untouched. conditions, guidance_scale: as `distill` takes them.
    Solvers that extrapolate in log sigma may do worse on these levels: a warning says so.
    Returns (intervals + 1,) float64, decreasing, on the CPU. Raises ConfigError.
    """
    resolved = resolve(model, shape=shape, label_dim=label_dim, sigma_min=sigma_min, sigma_max=sigma_max)
    span = noise_range(resolved)
    if not make_solver(solver, **dict(solver_options or {})).integrates:
        raise ConfigError(
            f"solver {solver!r} adds fresh noise between its evaluations: there is no solution of an ODE to be near to, which "
            f"noise levels are searched for; take {alternatives(integrator_names('none', 'optional'))}, or choose levels by "
            "looking at samples"
        )
    plan = make_plan(nfe, solver=solver, options=solver_options, afs=afs, guidance_scale=guidance_scale, **span)
    tell_of_zero(afs, plan)
    plan = measured(plan, resolved)
    levels, step = _grid(grid, plan, span), _step(cost, plan)
    _check_numbers(samples, batch, coefficient)
    batch = min(batch, samples)
    data = Batches(resolved, plan, batch, torch.Generator().manual_seed(seed), conditions)
    total = torch.zeros(len(levels), len(levels), dtype=torch.float64, device="cpu")
    count = math.ceil(samples / batch)
    with tqdm(total=count, desc=f"search NFE {nfe}", unit="batch", disable=not progress) as bar:
        for _ in range(count):
            ((denoiser, x),) = data.draw([slice(0, batch)])
            first = first_answer(plan, denoiser)
            total += cost_matrix(TeacherPath.of(denoiser, x, levels, first), step)
            bar.update()
    return levels[cheapest_path(total / count, plan.intervals, coefficient)]


@dataclass(frozen=True)
class TeacherPath:
    """A teacher's states (levels, B, ...) at the noise levels, and the denoiser's answers (levels - 1, B, ...) there."""

    denoiser: Denoiser
    levels: Tensor
    states: Tensor
    answers: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, denoiser: Denoiser, x: Tensor, levels: Tensor, first: Denoiser | None = None) -> TeacherPath:
        """From x (B, ...), scaled by levels[0]. first: what answers at the first level in the denoiser's place."""
        answers: list[Tensor] = []

        def recorded(x: Tensor, sigma: Tensor) -> Denoised:
            answers.append(as_denoised(denoiser(x, sigma)).x0)
            return Denoised(answers[-1])

        # One evaluation per level, at the state itself: its answers are the directions that steps from there need.
        program = Program.build(make_solver(TEACHER["solver"], **TEACHER["options"]), levels).on(x.device, x.dtype)
        states = integrate(program, recorded, x)
        if first is not None:
            answers[0] = as_denoised(first(x, program.sigmas[0].expand(len(x)))).x0
        return cls(denoiser, levels, torch.stack(states), torch.stack(answers))


# (path, i) -> the states (levels - 1 - i, B, ...) that steps from i to each j > i reach
Step = Callable[[TeacherPath, int], Tensor]


def euler_step(path: TeacherPath, i: int) -> Tensor:
    """x_i + (sigma_j - sigma_i) (x_i - D_i) / sigma_i for all j > i at once."""
    x, sigma = path.states[i], path.levels[i]
    h = (path.levels[i + 1 :] / sigma - 1).to(x).reshape(-1, *[1] * x.dim())
    return x + h * (x - path.answers[i])


def step_of(solver: Solver) -> Step:
    """One step of a solver from i to each j > i; its first evaluation is known."""

    def to(path: TeacherPath, i: int, j: int) -> Tensor:
        x = path.states[i]
        program = Program.build(solver, path.levels[[i, j]]).on(x.device, x.dtype)
        return integrate(program, known_first(path.denoiser, Denoised(path.answers[i])), x)[-1]

    return lambda path, i: torch.stack([to(path, i, j) for j in range(i + 1, len(path.levels))])


@torch.no_grad()
def cost_matrix(path: TeacherPath, step: Step) -> Tensor:
    """c(i, j) for i < j, (levels, levels) float64 on the CPU; infinite elsewhere: no step goes up."""
    count = len(path.levels)
    cost = torch.full((count, count), math.inf, dtype=torch.float64, device="cpu")
    if not bool(torch.isfinite(path.states).all()):
        raise ConfigError("the teacher's trajectory is not finite; look at what the model returns")
    for i in range(count - 1):
        errors = (step(path, i) - path.states[i + 1 :]).double()
        cost[i, i + 1 :] = errors.square().flatten(1).mean(1).cpu()
    return cost


def cheapest_path(cost: Tensor, steps: int, coefficient: float = COEFFICIENT) -> list[int]:
    """The steps + 1 indices from the first to the last whose Σ_s coefficient^s · cost[i_s, i_s+1] is least."""
    best, ways = cost[:, -1], []
    for _ in range(steps - 1):
        best, way = (cost + coefficient * best).min(dim=1)
        ways.append(way.tolist())
    path = [0]
    for way in reversed(ways):
        path.append(way[path[-1]])
    return [*path, len(cost) - 1]


# ---- what was asked for ----

_EULER_IS_NO_GUIDE = (
    "the costs are those of Euler steps; %s extrapolates in log sigma, where these levels may do worse than its own schedule: "
    "compare before use"
)


def _check_numbers(samples: int, batch: int, coefficient: float) -> None:
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in (samples, batch)):
        raise ConfigError(f"samples and batch must be positive integers, got {samples!r} and {batch!r}")
    if not 0 < coefficient < math.inf:
        raise ConfigError(f"coefficient must be a positive number, got {coefficient!r}")


def _grid(grid: int | Tensor, plan: Plan, span: Mapping[str, Any]) -> Tensor:
    """The levels to choose from: at least as many as the plan has."""
    least = plan.intervals + 1
    if isinstance(grid, Tensor):
        levels = check_sigmas(grid)
        if len(levels) < least:
            raise ConfigError(f"NFE {plan.nfe} needs {least} noise levels, got a grid of {len(levels)} to choose from")
        return levels
    in_range("search_schedule", "grid", grid, least, 1000)
    return make_schedule("polynomial", grid, **span)


def _step(cost: str, plan: Plan) -> Step:
    """What the cost is of. Raises ConfigError for solvers whose step depends on more than its start."""
    solver = plan.make_solver()
    if plan.midpoint:
        raise ConfigError(
            f"solver {plan.solver!r} needs a predictor, whose noise levels are its own; search for a training-free one"
        )
    if cost not in COSTS:
        raise ConfigError(f"cost must be one of {', '.join(COSTS)}; got {cost!r}")
    if cost == "euler":
        if plan.solver in ("dpmpp", "unipc") and solver.memory:
            logger.warning(_EULER_IS_NO_GUIDE, plan.describe())
        return euler_step
    if solver.memory or solver.corrects:
        raise ConfigError(
            f"solver {plan.describe()!r} remembers earlier evaluations, so that no step of it has an error of its own; "
            "use cost='euler'"
        )
    return step_of(solver)
