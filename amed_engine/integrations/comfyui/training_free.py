"""Solvers that need no predictor: the node, and entries in the lists of KSampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import ConfigError, require
from amed_engine.integrations.comfyui.flow import INSIDE
from amed_engine.integrations.comfyui.host import host_levels, usable_range
from amed_engine.integrations.comfyui.sampling import TrainingFree, draw
from amed_engine.integrations.comfyui.trained import sampler
from amed_engine.integrations.common import without_zero
from amed_engine.solvers import integrator_names, make_solver
from amed_engine.solvers.plan import Plan, make_plan
from amed_engine.solvers.program import Program
from amed_engine.solvers.schedule import make_schedule

SCHEDULES = ["polynomial", "time_uniform", "logsnr", "discrete"]
AFS = ["off", "on"]
# Those of the ODE: consistency sampling needs a model of another kind, and fresh noise.
NAMES = integrator_names("none", "optional")
PREFIX = "amed_"  # in the lists of KSampler


class OfPlan(TrainingFree):
    """A plan's solver: on its own levels, to the last digit, where the host gives those, on the host's elsewhere."""

    def __init__(self, plan: Plan):
        super().__init__(plan.make_solver())
        self.plan = plan

    def program(self, levels: Tensor, like: Tensor) -> Program:
        own, given = self.plan.levels, without_zero(levels)
        # In float32 a flow model's t near 1 says sigma to a few digits only.
        if len(given) == len(levels) == len(own) and torch.allclose(given, own, rtol=1e-3, atol=0):
            return self.plan.program().on(like.device, like.dtype)
        if self.plan.afs:
            raise ConfigError(
                f"AMED Solver makes its first step analytic (afs) on its own noise levels, from {own[0]:g} to {own[-1]:g}, "
                f"got SIGMAS from {given[0]:g} to {given[-1]:g}; connect the SIGMAS of AMED Solver, or set afs to off"
            )
        return super().program(levels, like)


def solver(model: Any, solver: str, nfe: int, schedule: str, afs: str, denoise: float) -> tuple[Any, Tensor]:
    """(SAMPLER, SIGMAS). denoise below 1: the last steps, as many as nfe pays for, of a schedule with steps / denoise."""
    sampling = model.get_model_object("model_sampling")
    if not 0 <= denoise <= 1:
        raise ConfigError(f"denoise must lie between 0 and 1, got {denoise:g}")
    plan = plan_on(sampling, nfe, solver, schedule, afs)
    if denoise == 1:
        return sampler(OfPlan(plan)), host_levels(plan.levels, sampling)
    if plan.afs:
        raise ConfigError("the first step is analytic (afs) only from pure noise; set afs to off, or denoise to 1")
    if denoise == 0:
        return sampler(TrainingFree(plan.make_solver())), torch.empty(0)
    whole = plan_on(sampling, int(plan.intervals / denoise) * plan.nfe // plan.intervals, solver, schedule, afs)
    plan = make_plan(None, solver=solver, schedule=whole.levels[-(plan.intervals + 1) :], afs=False)
    return sampler(OfPlan(plan)), host_levels(plan.levels, sampling)


def plan_on(sampling: Any, nfe: int, solver: str, schedule: str, afs: str, **options: Any) -> Plan:
    """A plan over the range of a model, by the widgets of a node."""
    if afs not in AFS:
        raise ConfigError(f"afs must be off or on, got {afs!r}")
    low, high = usable_range(sampling)
    table = {"alphas_cumprod": alphas_cumprod(sampling)} if schedule == "discrete" else {}
    return make_plan(
        nfe, solver=solver, schedule=schedule, sigma_min=low, sigma_max=high, afs=afs == "on", **table, **options
    )


def alphas_cumprod(sampling: Any) -> Tensor:
    """The table of a model that was trained on discrete steps: 1 / (1 + sigma²)."""
    if not isinstance(sampling, require("comfy.model_sampling", INSIDE).ModelSamplingDiscrete):
        raise ConfigError(
            "schedule discrete is for models that were trained on a table of noise levels, and this MODEL has none; choose "
            "polynomial, time_uniform or logsnr"
        )
    return 1 / (1 + sampling.sigmas.cpu().double() ** 2)


def register() -> None:
    """Every training-free solver as amed_NAME in the list of samplers of KSampler, and three schedules in its other one."""
    samplers, functions = require("comfy.samplers", INSIDE), require("comfy.k_diffusion.sampling", INSIDE)
    for name in NAMES:
        setattr(functions, f"sample_{PREFIX}{name}", _function(name))
        _append(PREFIX + name, samplers.KSAMPLER_NAMES, samplers.SAMPLER_NAMES, samplers.KSampler.SAMPLERS)
    if not hasattr(samplers, "SCHEDULER_HANDLERS"):  # until 0.3.10 there was no table to add a schedule to
        return
    for name in ("polynomial", "time_uniform", "logsnr"):
        samplers.SCHEDULER_HANDLERS[PREFIX + name] = samplers.SchedulerHandler(_handler(name))
        _append(PREFIX + name, samplers.SCHEDULER_NAMES, samplers.KSampler.SCHEDULERS)


def _append(name: str, *lists: list[str]) -> None:
    for names in lists:
        if name not in names:
            names.append(name)


def _function(solver: str) -> Callable[..., Tensor]:
    recipe = TrainingFree(make_solver(solver))

    def sample(model: Any, x: Tensor, sigmas: Tensor, **named: Any) -> Tensor:
        return draw(model, x, sigmas, **named, recipe=recipe)

    sample.__name__ = f"sample_{PREFIX}{solver}"
    return sample


def _handler(schedule: str) -> Callable[[Any, int], Tensor]:
    def sigmas(model_sampling: Any, steps: int) -> Tensor:
        """(steps + 1,), the last 0: the model is evaluated at each but that."""
        low, high = usable_range(model_sampling)
        levels = make_schedule(schedule, steps, low, high) if steps > 1 else torch.tensor([high], dtype=torch.float64)
        return torch.cat([host_levels(levels, model_sampling), torch.zeros(1)])

    return sigmas
