"""What a diffusers scheduler says of the network it was trained with. Read by attribute: nothing is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def shift_of(scheduler: Any, shape: Sequence[int], patch: int = 2) -> float:
    """The shift of a FlowMatchEulerDiscreteScheduler for samples (C, H, W), as `flow_levels` takes it.

    A fixed one, or exp(mu) with mu linear in the number of tokens of patch x patch pixels (Flux):

        mu = base_shift + (tokens - base_seq)/(max_seq - base_seq)·(max_shift - base_shift)

    Raises ConfigError for another scheduler, or one that shifts otherwise.
    """
    config = getattr(scheduler, "config", None)
    if config is None or not type(scheduler).__name__.startswith("FlowMatch"):
        raise ConfigError(f"a shift is that of a flow-matching scheduler of diffusers, got {type(scheduler).__name__}")
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or 1.0)
    if config.get("time_shift_type", "exponential") != "exponential" or len(shape) != 3:
        raise ConfigError(
            f"need an exponential shift and a shape (C, H, W), got {config.get('time_shift_type')!r}, {tuple(shape)}"
        )
    tokens = shape[1] * shape[2] / patch**2
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(low + (tokens - least) / (most - least) * (high - low))
