"""Which plan runs: what the caller asked for, what the predictor was trained for, and the defaults."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.adapters.fingerprint import can_tell
from amed_engine.adapters.recorded import difference, is_recorded
from amed_engine.checkpoints import load_predictor
from amed_engine.engine.model import Model, check_integrable
from amed_engine.engine.steps import check_steps, steps_for
from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import said
from amed_engine.sampling.predictors import CoefficientPredictor, Predictor
from amed_engine.solvers.arguments import is_whole
from amed_engine.solvers.mean import FirstStep, Mean
from amed_engine.solvers.plan import Plan, best_training_free, make_plan
from amed_engine.solvers.schedule import check_sigmas
from amed_engine.solvers.stage import Midpoint, Row

NO_PREDICTOR = "none"  # keeps the model's own predictors away

# How an error speaks of the plan that rules.
TRAINED, MADE = "this predictor was trained", "this plan was made"
_REMEDIES = {TRAINED: "pass its own predictor, train one with amed_engine.distill", MADE: "pass a plan of this model"}


@dataclass(frozen=True)
class PlanRequest:
    """What the caller asked for, before the predictor and the defaults have their say."""

    solver: str | None
    options: Mapping[str, Any] | None
    nfe: int | None
    schedule: str | Tensor | None
    rho: float | None
    afs: FirstStep | None
    sigma_min: float | None
    sigma_max: float | None
    usable: tuple[float, float]  # noise levels of the model that schedules use
    recipe: Plan | None = None
    mean: Mean | None = None  # of the model, where it is known without measuring
    network: Any = None  # of the model, whose training steps "discrete" is spaced over

    @property
    def open(self) -> bool:
        """Nothing but perhaps the NFE, or another range of noise levels, was asked for."""
        return self.solver is self.schedule is self.afs is self.rho is self.recipe is None and not self.options

    def plan(self, *, midpoint: bool) -> Plan:
        """The plan that was asked for, with a predictor that has none of its own or without any."""
        schedule = self.schedule
        nfe = self.nfe if self.nfe is not None or isinstance(schedule, Tensor) else 5
        low, high = self.usable
        start = float(schedule.max()) if isinstance(schedule, Tensor) and schedule.numel() else high
        known = self.mean is not None and not midpoint and self.mean.is_for(start, None, None)
        first = {"afs": self.afs, "mean": self.mean if known else None}
        common: dict[str, Any] = {"rho": self.rho, **first, "sigma_min": low, "sigma_max": high}
        common["alphas_cumprod"] = steps_for(self.network, schedule)
        if self.rho is not None and (isinstance(schedule, Tensor) or schedule == "logsnr"):
            raise ConfigError(
                f"rho={self.rho} is the exponent of the other schedules; with logsnr or levels, leave it out"
            )
        if self.solver is None and self.options:
            raise ConfigError("solver_options need a solver; pass solver=... as well")
        if self.solver is None and not midpoint:
            own = {} if schedule is None else {"schedule": schedule}
            return best_training_free(nfe, **own, **common)
        return make_plan(
            nfe, solver=self.solver or "amed", options=self.options, schedule=schedule, midpoint=midpoint, **common
        )


class Pairing(NamedTuple):
    """What runs: a plan, with a predictor or without. fallback: the plan that is right where the model's own is not."""

    plan: Plan
    predictor: Predictor | None
    fallback: Plan | None


def pair(model: Model, predictor: Any, request: PlanRequest, *, verify: bool, autocast: torch.dtype | None) -> Pairing:
    """A model, what was asked for and a predictor (or a path, None, "none"); see `Sampler`. Raises ConfigError where they
    differ."""
    unasked = predictor is None and request.open and request.sigma_min is request.sigma_max is None
    if predictor is None:
        predictor = choose_predictor(model, request, unasked)
    elif predictor == NO_PREDICTOR:
        predictor = None
    else:
        predictor = open_predictor(predictor)
    plan = choose_plan(request, predictor)
    if plan.make_solver().integrates:
        check_integrable(model)
    rules = ruling(request.recipe, predictor)
    for rule, made in rules:
        check_range(rule, request, made)
    if predictor is not None and not rules:
        rules = [(plan, TRAINED)]  # as published: its levels at least
    for rule, made in rules if verify else ():
        check_model(model, rule, made, reads_bottleneck=predictor is not None and predictor.reads_bottleneck)
        if not unasked:  # nobody who asks for autocast alone chose a predictor
            check_dtype(replace(model, autocast=autocast), rule, made)
    if predictor is None:
        return Pairing(plan, None, None)
    _check_answer(plan, predictor)
    check_bottleneck(model, predictor)
    # Of the model's own it steps aside where a run asks for guidance it was not trained for; one that was asked for raises.
    return Pairing(plan, predictor, replace(request, nfe=plan.nfe).plan(midpoint=False) if unasked else None)


def _check_answer(plan: Plan, predictor: Predictor) -> None:
    """A solver asks for midpoints, or for rows of coefficients; a predictor says the one or the other."""
    asked = plan.make_solver().answer
    if asked is not (Row if isinstance(predictor, CoefficientPredictor) else Midpoint):
        raise ConfigError(
            f"solver {plan.solver!r} asks for a {asked.__name__} for every interval, which {type(predictor).__name__} does not "
            "say: this predictor is for another solver; pass the plan it is for, or another predictor"
        )


def open_plan(plan: Plan | str | os.PathLike | None) -> Plan | None:
    """A plan, or the one in a file. Raises ConfigError, FileFormatError."""
    if isinstance(plan, (str, os.PathLike)):
        return Plan.load(plan)
    if plan is not None and not isinstance(plan, Plan):
        raise ConfigError(
            f"plan must be a Plan, or the path of a file that Plan.save or `amed search-schedule` wrote, got "
            f"{type(plan).__name__}"
        )
    return plan


def open_predictor(predictor: Any) -> Predictor:
    """A predictor, or the one in a file. Raises ConfigError, FileFormatError."""
    if isinstance(predictor, (str, os.PathLike)):
        return load_predictor(predictor)
    if not isinstance(predictor, Predictor):
        raise ConfigError(
            f"predictor must be one of this package (AMEDPredictor, ...) or a path, got {type(predictor).__name__}"
        )
    return predictor


def choose_predictor(model: Model, request: PlanRequest, unasked: bool) -> Predictor | None:
    """The model's own, where nothing but perhaps the NFE was asked for (`unasked`), or where the plan that was is its plan.

    Where the NFE was not either: the one for 5, else the first.
    """
    own, nfe, recipe = model.predictors, request.nfe, request.recipe
    if unasked and nfe is None:
        return own.get(5) or next(iter(own.values()), None)
    if unasked:
        return own.get(nfe) if is_whole(nfe, 1) else None  # type: ignore[arg-type]  (what is no NFE is refused with its plan)
    if recipe is None or not recipe.midpoint:
        return None
    found = own.get(recipe.nfe)
    return found if found and found.plan and not differences(recipe, found.plan) else None


def choose_plan(request: PlanRequest, predictor: Predictor | None) -> Plan:
    own, recipe = None if predictor is None else predictor.plan, request.recipe
    if own is not None and not own.midpoint:
        raise ConfigError(
            f"the predictor's plan says midpoint=False ({own.describe()}): a plan for a predictor refines every "
            "interval; make it with make_plan(..., midpoint=True)"
        )
    if recipe is not None:
        _check_recipe(recipe, predictor, own)
    plan = own or recipe
    if plan is None:
        return request.plan(midpoint=predictor is not None)
    _check_against(request, plan, TRAINED if own else MADE)
    return plan


def _check_recipe(recipe: Plan, predictor: Predictor | None, own: Plan | None) -> None:
    """A plan given must be the predictor's own, or fit a predictor that has none, or no predictor."""
    if own is not None and (differing := differences(recipe, own)):
        raise ConfigError(
            f"the plan given ({recipe.describe()}) is not the one that this predictor was trained for ({own.describe()}): they "
            f"differ in {', '.join(differing)}; leave the plan out, or pass the predictor that it is for"
        )
    if recipe.midpoint and predictor is None:
        raise ConfigError(
            f"this plan needs a predictor ({recipe.describe()}), and there is none; pass predictor= as well"
        )
    if not recipe.midpoint and predictor is not None:
        raise ConfigError(
            f"this plan has no use for a predictor ({recipe.describe()}); leave the predictor out, or make the plan with "
            "make_plan(..., midpoint=True)"
        )


def ruling(recipe: Plan | None, predictor: Predictor | None) -> list[tuple[Plan, str]]:
    """The plans that the caller has to abide by, and how errors speak of them."""
    own = None if predictor is None else predictor.plan
    return [(plan, made) for plan, made in ((recipe, MADE), (own, TRAINED)) if plan is not None]


def differences(plan: Plan, other: Plan) -> list[str]:
    """The entries in which two plans differ, apart from what they note of the model."""
    names = (field.name for field in fields(Plan) if field.name not in ("model", "dtype", "wrapping"))
    return [name for name in names if getattr(plan, name) != getattr(other, name)]


def _check_against(request: PlanRequest, plan: Plan, made: str) -> None:
    """A predictor is only right for what it was trained for, and a plan says everything."""
    asked = {"nfe": request.nfe, "solver": request.solver, "rho": request.rho, "afs": request.afs}
    if isinstance(request.schedule, str):
        asked["schedule"] = request.schedule
    for name, value in asked.items():
        if value is not None and value != getattr(plan, name):
            raise ConfigError(
                f"{made} for {name}={getattr(plan, name)}, got {name}={value}; leave {name} out, or "
                f"{'train one for it with amed_engine.distill' if made == TRAINED else 'pass another plan'}"
            )
    if isinstance(request.schedule, Tensor) and not _same_levels(request.schedule, plan.levels):
        raise ConfigError(f"{made} for other noise levels than the schedule given; leave schedule out")
    own = dict(plan.options)
    named = request.options or {}
    if not isinstance(named, Mapping) or any(name not in own or own[name] != named[name] for name in named):
        raise ConfigError(f"{made} for solver options {own}, got {request.options}")


def check_range(plan: Plan, request: PlanRequest, made: str) -> None:
    """A range of noise levels that was asked for must be the plan's."""
    for name, own in (("sigma_min", plan.sigmas[-1]), ("sigma_max", plan.sigmas[0])):
        if (asked := getattr(request, name)) is not None and not math.isclose(asked, own, rel_tol=1e-6):
            raise ConfigError(f"{made} for {name}={own:g}, got {name}={asked:g}; leave {name} out")


def _same_levels(given: Tensor, levels: Tensor) -> bool:
    given = check_sigmas(given)
    return given.shape == levels.shape and torch.allclose(given, levels, rtol=1e-6, atol=0)


def check_bottleneck(model: Model, predictor: Predictor) -> None:
    """A predictor reads a bottleneck of one size; of other models than those that tell theirs, the loop finds out."""
    expected, own = getattr(predictor, "bottleneck", None), said(model.network, "bottleneck_size")
    if expected is not None and own is not None and tuple(own) != tuple(expected):
        raise ConfigError(
            f"this predictor reads bottlenecks of {expected[0]}x{expected[1]}, the model's are {own[0]}x{own[1]}: it was "
            "made for another network"
        )


def check_model(model: Model, plan: Plan, made: str, *, reads_bottleneck: bool = True) -> None:
    """By its fingerprint; a plan without one, as of published predictors, at least by the noise levels that the model knows."""
    if plan.model is None or not can_tell(model.network):
        _check_levels(model, plan, made)
        if made == MADE:  # of published predictors, the levels in their files rule
            check_steps(model, plan)
    elif not is_recorded(model.network, plan, reads_bottleneck=reads_bottleneck):
        raise ConfigError(
            f"{made} for another model (or other weights or another wrapping of it): the fingerprints differ; "
            f"{difference(model.network, plan)}; {_REMEDIES[made]}, or verify=False to use it all the same"
        )


def _check_levels(model: Model, plan: Plan, made: str) -> None:
    low, high = (said(model.network, name) for name in ("sigma_min", "sigma_max"))
    # A hundredth is rounding of the tables of discrete steps.
    if (high and plan.sigmas[0] > 1.01 * high) or (low and plan.sigmas[-1] < 0.99 * low):
        raise ConfigError(
            f"{made} for noise levels {plan.sigmas[0]:g} to {plan.sigmas[-1]:g}, the model for {high:g} to "
            f"{low:g}: it was made for another model; verify=False uses it all the same"
        )


def check_dtype(model: Model, plan: Plan, made: str) -> None:
    """The network's arithmetic must be that of the training; plans from before it was noted say nothing."""
    if None not in (plan.dtype, model.precision) and plan.dtype != model.precision:
        remedy = "convert the network" if model.autocast is None else f"leave autocast={model.autocast} out"
        raise ConfigError(
            f"{made} for a network in {plan.dtype}, got one in {model.precision}, whose rounding it knows "
            f"nothing of; {remedy}, or pass verify=False to use it all the same"
        )
