"""Training-free plans of which one may be the best for a model: every solver on every spacing of the noise levels, with every
first step. None is thresholded dynamically, which is no approximation of the ODE's solution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from amed_engine.adapters.discrete import alphas_of, family_of
from amed_engine.adapters.flow import Flow, flow_levels
from amed_engine.engine.model import Model
from amed_engine.evaluation.comparison import TRAINING_FREE
from amed_engine.solvers import make_solver
from amed_engine.solvers.arguments import check_nfe
from amed_engine.solvers.base import count_intervals
from amed_engine.solvers.mean import FirstStep, Mean
from amed_engine.solvers.plan import Plan, make_plan
from amed_engine.solvers.program import Program
from amed_engine.training.presets import noise_range

# Schedule by name -> its exponents; None is its own. Those of time_uniform above 1 have more levels where there is least noise.
RHOS: dict[str, tuple[float | None, ...]] = {
    "polynomial": (7.0,),
    "logsnr": (None,),
    "time_uniform": (1.0, 2.0),
    "discrete": (1.0, 2.0),
}
SHIFTS = (1.0, 3.0)  # of flows

# How many intervals -> schedule, and what it needs, as `make_plan` takes them.
Spacing = Callable[[int], dict[str, Any]]


class Contender(NamedTuple):
    """A plan by the name that `amed compare` has for its solver."""

    name: str
    plan: Plan

    def program(self) -> Program:
        """Its program without the numbers of the mean, which the examples bring for their own labels."""
        return replace(self.plan.program(), mean=None)


def first_steps(mean: Mean | None) -> tuple[FirstStep, ...]:
    """Those that there are to choose from."""
    return (False, True) if mean is None else (False, True, "mean")


def contenders(
    model: Model, nfe: int, firsts: tuple[FirstStep, ...], mean: Mean | None = None, guidance_scale: float | None = None
) -> list[Contender]:
    """Those that spend `nfe` evaluations, with one of these first steps; mean: what "mean" starts about. Raises ConfigError."""
    nfe = check_nfe(nfe)
    common = {**noise_range(model), "guidance_scale": guidance_scale}
    found = []
    for first in firsts:
        about = {"afs": first, "mean": mean if first == "mean" else None}
        for spacing in spacings(model):
            for name, (solver, options) in TRAINING_FREE.items():
                per_interval = make_solver(solver, **options).evaluations(False)
                if intervals := count_intervals(per_interval, nfe, afs=first):
                    asked = {"solver": solver, "options": options, **spacing(intervals)}
                    found.append(Contender(name, make_plan(nfe, **asked, **about, **common)))
    return found


def spacings(model: Model) -> Iterator[Spacing]:
    """Every schedule that needs no table, with the table too where the network knows its own betas; for flows, times."""
    own_table, family = alphas_of(model.network), family_of(model.network)
    tables = None if own_table is None else {"alphas_cumprod": own_table}
    for schedule, exponents in RHOS.items():
        own = tables if schedule == "discrete" else {}
        if own is not None:
            yield from (partial(_named, schedule=schedule, rho=rho, **own) for rho in exponents)
    if isinstance(family, Flow):
        yield from (partial(_flow, shift=shift, **noise_range(model)) for shift in SHIFTS)


def _named(intervals: int, **schedule: Any) -> dict[str, Any]:
    return schedule


def _flow(intervals: int, shift: float, sigma_min: float, sigma_max: float) -> dict[str, Any]:
    """Times equally spaced, then shifted, between the same ends whatever the shift."""
    low, high = (sigma / shift / (1 + sigma / shift) for sigma in (sigma_min, sigma_max))
    return {"schedule": flow_levels(intervals, shift, low, high)}
