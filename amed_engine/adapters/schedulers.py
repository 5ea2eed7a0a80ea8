"""What a diffusers scheduler says of the network it was trained with. Read by attribute: nothing is imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import ConfigError

NAMES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
# A zero terminal signal-to-noise ratio has an infinite sigma; the last level is then this far from it, as in diffusers.
SMALLEST = 2.0**-24


def prediction_of(scheduler: Any) -> str:
    """The name of the prediction, as `wrap` knows it. Raises ConfigError."""
    config = getattr(scheduler, "config", None)
    if config is None:
        raise ConfigError(f"scheduler must be a diffusers scheduler with a config, got {type(scheduler).__name__}")
    name = type(scheduler).__name__
    if name.startswith("FlowMatch"):
        return "flow"
    if name.startswith("EDM"):
        return "edm"
    told = config.get("prediction_type")
    if told not in NAMES:
        raise ConfigError(
            f"{name} has prediction_type={told!r}; known are {', '.join(NAMES)}; pass prediction=... instead of scheduler"
        )
    return NAMES[told]


def has_betas(scheduler: Any) -> bool:
    return isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor)


def betas_of(scheduler: Any) -> Tensor:
    """alphas_cumprod of the scheduler, float64. Raises ConfigError where it has none."""
    if not has_betas(scheduler):
        raise ConfigError(f"{type(scheduler).__name__} has no alphas_cumprod; pass betas=... as well")
    return scheduler.alphas_cumprod.detach().to("cpu", torch.float64).clamp_min(SMALLEST)
