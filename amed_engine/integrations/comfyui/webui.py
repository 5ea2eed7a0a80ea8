"""Forge and A1111: an entry for their list of samplers, and the schedule that belongs to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.taps import Bottleneck
from amed_engine.errors import ConfigError
from amed_engine.integrations.comfyui.trained import options_of, plan_of
from amed_engine.integrations.k_diffusion import sample_amed
from amed_engine.sampling.predictors.amed import AMEDPredictor


def sampler_entry(
    predictor: AMEDPredictor, bottleneck: Bottleneck | None = None, label: str = "AMED"
) -> tuple[str, Callable[..., Tensor], list[str], dict[str, Any]]:
    """(label, function, aliases, options), as `sd_samplers_kdiffusion.samplers_k_diffusion` has them.

    Guidance is batched inside the host's model, so `bottleneck` is a function that returns the conditional rows, e.g.
    `ConditionalFeatures().take`; without one the predictor works as constants.
    """
    function = functools.partial(sample_amed, bottleneck=bottleneck, **options_of(predictor))
    return label, function, [label.lower()], {}


def schedule(predictor: AMEDPredictor) -> Callable[..., Tensor]:
    """A function (n, sigma_min, sigma_max, device) for `sd_schedulers.Scheduler`: the predictor's own noise levels.

    Raises ConfigError for another number of steps than the predictor's.
    """
    plan = plan_of(predictor)

    def levels(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
        if n != plan.intervals:
            raise ConfigError(f"this predictor was trained for {plan.intervals} steps, got {n}; set the steps to that")
        return plan.levels.float().to(device)

    return levels
