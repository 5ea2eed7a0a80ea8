"""What was asked of a model, as programs that are ready to run: the plan's, and what steps in for the model's own predictor."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import amed_engine.zoo as zoo
from amed_engine.engine.measure import check_mean, measured
from amed_engine.engine.model import Model, check_guidance
from amed_engine.engine.notices import announce
from amed_engine.engine.pairing import PlanRequest, open_plan, pair
from amed_engine.engine.verification import verify_model
from amed_engine.errors import ConfigError
from amed_engine.sampling.predictors import Predictor
from amed_engine.solvers.mean import FirstStep, Mean
from amed_engine.solvers.plan import Plan, own_range
from amed_engine.solvers.program import Program

logger = logging.getLogger("amed_engine")

_NOT_FOR_GUIDANCE = "the model's own predictor is not for guidance_scale=%s: sampling with %s"


@dataclass(frozen=True)
class Wishes:
    """Arguments of a `Sampler` that decide its program; see there. None: not asked for."""

    predictor: Any = None
    plan: Plan | str | os.PathLike | None = None
    solver: str | None = None
    solver_options: Mapping[str, Any] | None = None
    nfe: int | None = None
    schedule: str | Tensor | None = None
    rho: float | None = None
    afs: FirstStep | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self):
        """Raises ConfigError."""
        levels = self.schedule
        dense = isinstance(levels, Tensor) and levels.layout == torch.strided and levels.device.type != "meta"
        if isinstance(levels, Tensor) and (not dense or levels.is_complex()):
            raise ConfigError(
                f"schedule must be a name or a tensor of real numbers, noise levels, got {levels.dtype} of layout "
                f"{levels.layout} on {levels.device}"
            )


@dataclass
class Prepared:
    """A plan with its program on the device, and the predictor in it. fallback: what runs under guidance that the
    model's own predictor is not for."""

    model: Model
    plan: Plan
    predictor: Predictor | None
    program: Program
    fallback: tuple[Program, Plan] | None
    _told: set[float | None] = field(default_factory=set)  # the guidances for which the log says that it stepped aside

    def under(self, guidance_scale: float | None) -> tuple[Program, Plan]:
        """The program for this guidance: a predictor is only right for the one it was trained with. Raises ConfigError."""
        check_guidance(self.model, guidance_scale)
        # A scale of 1 is no guidance: D_u + 1 (D_c - D_u) = D_c.
        asked, trained = (1 if scale is None else scale for scale in (guidance_scale, self.plan.guidance_scale))
        free = self.program.predictor is None and self.plan.guidance_scale is None
        if free or asked == trained:
            return self.program, self.plan
        if self.program.predictor is None:
            raise ConfigError(
                f"this plan was made for guidance_scale={trained}, got {guidance_scale}; pass that value, or another plan"
            )
        if self.fallback is None:
            raise ConfigError(
                f"this predictor was trained with guidance_scale={self.plan.guidance_scale}, got {guidance_scale}; pass that "
                f"value, or train one with amed_engine.distill(model, guidance_scale={guidance_scale})"
            )
        if guidance_scale not in self._told:
            self._told.add(guidance_scale)
            logger.warning(_NOT_FOR_GUIDANCE, guidance_scale, self.fallback[1].describe())
        return self.fallback


def prepare(
    model: Model, tuned: Model, wishes: Wishes, *, verify: bool, device: torch.device, dtype: torch.dtype
) -> Prepared:
    """tuned: the model as it will run, see `tune`. verify: see `Sampler`. Raises ConfigError, FileFormatError."""
    usable, recipe = own_range(model.sigma_min, model.sigma_max), open_plan(wishes.plan)
    mean = _bundled_mean(replace(model, autocast=tuned.autocast))
    request = PlanRequest(
        solver=wishes.solver,
        options=wishes.solver_options,
        nfe=wishes.nfe,
        afs=wishes.afs,
        schedule=wishes.schedule,
        rho=wishes.rho,
        sigma_min=wishes.sigma_min,
        sigma_max=wishes.sigma_max,
        usable=usable,
        recipe=recipe,
        mean=mean,
        network=model.network,
    )
    pairing = pair(model, wishes.predictor, request, verify=verify, autocast=tuned.autocast)
    announce(model, wishes.predictor, request, pairing)
    plan, chosen, fallback = pairing
    if verify:
        verify_model(model, plan)
    for made in (plan, fallback):
        if made is not None:
            check_mean(made, tuned, verify=verify)
    plan, fallback = measured(plan, tuned, mean), measured(fallback, tuned, mean)
    # A copy: the caller's predictor keeps its device, precision and mode.
    predictor = None if chosen is None else copy.deepcopy(chosen).to(device, dtype).eval()
    program = _build(plan, predictor).on(device, dtype)
    aside = None if fallback is None else (_build(fallback, None).on(device, dtype), fallback)
    return Prepared(model, plan, predictor, program, aside)


def _build(plan: Plan, predictor: Predictor | None) -> Program:
    return plan.program(None if predictor is None else predictor.choices())


def _bundled_mean(model: Model) -> Mean | None:
    """The mean answer that a zoo model brings, where it is used as it was measured."""
    mean = zoo.bundled_mean(model.name) if model.name else None
    as_measured = mean is not None and (mean.shape, mean.classes, mean.dtype) == (
        model.shape,
        model.label_dim,
        model.precision,
    )
    return mean if as_measured else None
