"""Where a scheduler's steps stand, by the settings that diffusers' schedulers have for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.discrete import DiscreteSteps
from amed_engine.adapters.flow import Flow
from amed_engine.adapters.schedulers import SPACING
from amed_engine.errors import ConfigError, require
from amed_engine.integrations.diffusers.parameterization import Parameterization
from amed_engine.integrations.diffusers.shifting import flow_times, sigma_of
from amed_engine.solvers.schedule import logsnr, polynomial

SPACINGS = ("leading", "linspace", "trailing")
SCHEDULES = ("karras", "exponential")


def check_spacing(settings: Mapping[str, Any], model: Parameterization) -> None:
    """Raise ConfigError for settings that are not understood, contradict each other or say nothing of this model."""
    told = [name for name in sorted(SPACING) if settings.get(name)]
    if settings["sigma_schedule"] not in SCHEDULES:
        raise ConfigError(
            f"sigma_schedule must be karras or exponential, got {settings['sigma_schedule']!r}; pass sigmas for others"
        )
    if not isinstance(settings["rho"], (int, float)) or not 0 < settings["rho"] < math.inf:
        raise ConfigError(f"rho must be a positive number, got {settings['rho']!r}")
    if told and settings["noise_levels"] is not None:
        raise ConfigError(
            f"noise_levels are what the midpoints were made for, {', '.join(told)} asks for other ones; leave one out"
        )
    _check_schedule(settings, model)
    _check_steps(settings, model)


def _check_schedule(settings: Mapping[str, Any], model: Parameterization) -> None:
    named = [name for name in sorted(SPACING) if name.endswith("_sigmas") and settings.get(name)]
    own = settings["sigma_schedule"]
    if len(named) > 1 or (named and own != "karras" and named[0] != f"use_{own}_sigmas"):
        raise ConfigError(f"sigma_schedule={own!r}, {', '.join(named)}: pass one schedule of noise levels")
    if isinstance(model.family, Flow) and own != "karras":
        raise ConfigError(f"sigma_schedule={own!r} is not of a flow-matching model; pass use_{own}_sigmas=True")


def _check_steps(settings: Mapping[str, Any], model: Parameterization) -> None:
    spacing, offset = settings.get("timestep_spacing"), settings.get("steps_offset") or 0
    if spacing not in (None, *SPACINGS):
        raise ConfigError(f"timestep_spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if spacing is not None and not isinstance(model.family, DiscreteSteps):
        raise ConfigError(
            f"timestep_spacing={spacing!r} says nothing of a model without training steps; leave it out, or pass beta_schedule"
        )
    if not isinstance(offset, int) or offset < 0 or (offset and spacing != "leading"):
        raise ConfigError(
            f"steps_offset={offset!r} with timestep_spacing={spacing!r}: an offset, 0 or more, goes with 'leading' alone"
        )


def spaced(model: Parameterization, settings: Mapping[str, Any], steps: int, mu: float | None = None) -> Tensor:
    """The noise levels of so many steps, float64: (steps,), or (steps + 1,) where the last one ends at sigma_min.

    mu: the shift of a flow-matching model with use_dynamic_shifting. Raises ConfigError.
    """
    ends_low = settings["final_sigmas_type"] == "sigma_min"
    count = steps + int(ends_low)
    if count < 2:
        raise ConfigError(f"AMEDScheduler needs at least 2 noise levels, got {count}; ask for more steps")
    if isinstance(model.family, Flow):
        times = flow_times(settings, count, mu)
        return sigma_of(_scheduled(settings, count, float(times[-1]), float(times[0]), times))
    low, high = model.range(settings["sigma_min"], settings["sigma_max"])
    if not settings.get("timestep_spacing"):
        return _scheduled(settings, count, low, high, None)
    levels = model.sigma(timesteps(settings, len(model.family.log_alpha), steps))  # type: ignore[union-attr]
    if ends_low and float(levels[-1]) > low * (1 + 1e-6):
        levels = torch.cat([levels, levels.new_tensor([low])])
    elif ends_low:
        levels = model.sigma(timesteps(settings, len(model.family.log_alpha), count))  # type: ignore[union-attr]
    low, high = settings["sigma_min"] or float(levels[-1]), settings["sigma_max"] or float(levels[0])
    return _scheduled(settings, count, low, high, levels)


def trained_levels(model: Parameterization, settings: Mapping[str, Any]) -> Tensor:
    """The noise levels of every training step, as many as num_train_timesteps, for what is done before steps are asked for."""
    family = model.family
    if isinstance(family, DiscreteSteps):
        return model.sigma(torch.arange(len(family.log_alpha) - 1.0, -1.0, -1.0, dtype=torch.float64, device="cpu"))
    return spaced(model, settings, settings["num_train_timesteps"] - int(settings["final_sigmas_type"] == "sigma_min"))


def timesteps(settings: Mapping[str, Any], trained: int, steps: int) -> Tensor:
    """So many of the training steps trained - 1 .. 0, descending float64 (steps,); table 2 of arXiv:2305.08891.

    linspace: trained - 1 to 0, fractions allowed;  leading: multiples of trained // steps, plus steps_offset
    trailing: trained - 1 downwards by trained / steps, rounded
    """
    if not 1 <= steps <= trained:
        raise ConfigError(f"timestep_spacing takes 1 to {trained} steps of this model, got {steps}; ask for fewer")
    count = torch.arange(steps, dtype=torch.float64, device="cpu")
    if settings["timestep_spacing"] == "linspace":
        return (trained - 1) * (1 - count / max(steps - 1, 1))
    if settings["timestep_spacing"] == "trailing":
        return (trained - count * (trained / steps)).round() - 1
    told = (count * (trained // steps)).flip(0) + (settings.get("steps_offset") or 0)
    if told[0] > trained - 1:
        raise ConfigError(
            f"steps_offset={settings['steps_offset']} leads beyond the last of {trained} training steps with {steps} steps; "
            "pass a smaller one, or fewer steps"
        )
    return told


def _scheduled(settings: Mapping[str, Any], count: int, low: float, high: float, own: Tensor | None) -> Tensor:
    """`count` values from high to low by the schedule that is told, else `own`, else by sigma_schedule."""
    if settings.get("use_beta_sigmas"):
        return beta_spaced(count, low, high)
    if settings.get("use_exponential_sigmas"):
        return logsnr(count, low, high)
    if own is not None and not settings.get("use_karras_sigmas"):
        return own
    exponential = own is None and settings["sigma_schedule"] == "exponential"
    return logsnr(count, low, high) if exponential else polynomial(count, low, high, settings["rho"])


def beta_spaced(count: int, low: float, high: float, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Quantiles of the beta distribution at equal steps, (count,) float64. Lee et al. 2024 (arXiv:2407.12173)."""
    stats = require("scipy.stats", "pip install scipy", "use_beta_sigmas")
    quantiles = stats.beta.ppf(1 - torch.linspace(0, 1, count, dtype=torch.float64, device="cpu").numpy(), a, b)
    return low + (high - low) * torch.as_tensor(quantiles, dtype=torch.float64, device="cpu")
