"""What the log says of the plan that runs, where nobody asked for all of it."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import Tensor

from amed_engine.engine.model import Model
from amed_engine.engine.pairing import Pairing, PlanRequest
from amed_engine.sampling.modules import said
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.plan import Plan

logger = logging.getLogger("amed_engine")

_HOW_TO_FIT = (
    "no predictor for this model at NFE %d: sampling with %s; amed_engine.fit(model, nfe=%d) fits one, "
    "amed_engine.calibrate finds the best plan without"
)
_MEASURE = 'afs="mean" measures a first step that needs no evaluation'
_HOW_TO_MEASURE = f"sampling with %s; {_MEASURE}"
_LEFT_OUT = (
    "the model's own predictor has its noise levels and its first step, others are asked for: sampling without it, with %s; "
    'predictor="none" (--predictor none) says so'
)
_ABOUT_ZERO = (
    "%s spends %d evaluations only where the first step is analytic, and that takes the data to lie about zero; "
    'afs="mean" measures where they lie, and one evaluation more or less needs no such step'
)


def announce(model: Model, predictor: Any, request: PlanRequest, pairing: Pairing) -> None:
    """predictor: what was given."""
    plan, own = pairing.plan, pairing.predictor
    warn_of_more(model, plan)
    if not isinstance(request.schedule, Tensor):  # the caller's own levels were asked for
        warn_of_range(model, plan, low=request.sigma_min is None, high=request.sigma_max is None)
    if request.recipe is not None or (own is not None and own.plan is not None):
        return
    if own is not None:
        tell_of_zero(request.afs, plan)
    elif predictor is None and request.solver is None and plan.nfe in model.predictors:
        logger.warning(_LEFT_OUT, plan.describe())
    elif predictor is None and request.open:
        told = _HOW_TO_FIT if plan.afs == "mean" else f"{_HOW_TO_FIT}, {_MEASURE}"
        logger.warning(told, plan.nfe, plan.describe(), plan.nfe)
    elif request.afs is None and plan.afs is False:
        logger.info(_HOW_TO_MEASURE, plan.describe())
    else:
        tell_of_zero(request.afs, plan)


def tell_of_zero(afs: FirstStep | None, plan: Plan, level: int = logging.WARNING) -> None:
    """A first step about zero that nobody asked for, where the number of evaluations leaves no other. afs: what was asked."""
    if afs is None and plan.afs is True:
        logger.log(level, _ABOUT_ZERO, plan.solver, plan.nfe)


def warn_of_range(model: Model, plan: Plan, *, low: bool = True, high: bool = True) -> None:
    """Noise levels that the model states and a plan leaves out are not cut off in silence; low, high: at which end."""
    least, most = (said(model.network, name) or 0 for name in ("sigma_min", "sigma_max"))
    # A hundredth is rounding of the tables of discrete steps.
    cut_above = high and math.isfinite(most) and plan.sigmas[0] < 0.99 * most
    if cut_above or (low and least and plan.sigmas[-1] > 1.01 * least):
        logger.warning(
            "the model's noise levels are %g to %g, this plan's %g to %g: what lies outside is left out; pass sigma_max= and "
            "sigma_min= if that is meant, or a plan for all of them",
            *(most, least, plan.sigmas[0], plan.sigmas[-1]),
        )


def warn_of_more(model: Model, plan: Plan) -> None:
    """Noise levels above those that the model states; a network of discrete steps is told steps after its last."""
    most = said(model.network, "sigma_max")
    if isinstance(most, float) and 0 < 1.01 * most < plan.sigmas[0]:
        logger.warning(
            "the model's noise levels end at %g, this plan's begin at %g: the network is told what it was not trained for; "
            "leave sigma_max= out, or pass noise levels up to the model's",
            *(most, plan.sigmas[0]),
        )
