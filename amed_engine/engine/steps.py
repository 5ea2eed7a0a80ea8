"""The training steps of a network, over which schedule "discrete" is spaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.discrete import alphas_of
from amed_engine.engine.model import Model
from amed_engine.errors import ConfigError
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.schedule import make_schedule


def steps_for(network: Any, *schedules: Any) -> Tensor | None:
    """The network's own training steps, where one of the schedules is "discrete", which is spaced over them. Raises ConfigError
    for a network without."""
    if not any(isinstance(schedule, str) and schedule == "discrete" for schedule in schedules):
        return None
    if (own := alphas_of(network)) is None:
        raise ConfigError(
            "schedule 'discrete' is spaced over the training steps of a network, and this one is known to have none; "
            'wrap(network, "epsilon", betas=...) says what they are; or pass noise levels, those of '
            'make_schedule("discrete", ..., alphas_cumprod=...)'
        )
    return own


def check_steps(model: Model, plan: Plan) -> None:
    """Levels of schedule "discrete" must be spaced over the model's own training steps, where these are known."""
    own = alphas_of(model.network) if plan.schedule == "discrete" else None
    if own is None:
        return
    ends = plan.sigmas[-1], plan.sigmas[0]
    expected = make_schedule("discrete", len(plan.sigmas), *ends, plan.rho, own)
    if not torch.allclose(expected, plan.levels, rtol=1e-3, atol=0):
        raise ConfigError(
            f"this plan was made on schedule 'discrete' of other betas: between {ends[1]:g} and {ends[0]:g} the model's "
            f"{len(own)} steps give {_few(expected)}, the plan says {_few(plan.levels)}; pass a plan of this model, or "
            "verify=False to use it all the same"
        )


def _few(levels: Tensor) -> str:
    """The inner levels, at most four."""
    inner = levels[1:-1].tolist()
    return ", ".join(f"{level:.4g}" for level in inner[:4]) + (", ..." if len(inner) > 4 else "")
