"""The times of a flow-matching scheduler: equally spaced, shifted towards the noise, stretched to an end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import ConfigError

# At t = 1 there is no data left and sigma = t/(1 - t) has no end; as diffusers' UniPC has it, this is what lies before it.
LAST = 1 - 1e-6
KINDS = ("exponential", "linear")
# Of no other model, with what says nothing: DPM-Solver and its relatives say the rest of every model.
FLOW_ALONE = {"use_flow_sigmas": False, "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}


def sigma_of(times: Tensor) -> Tensor:
    """sigma = t/(1 - t), float64; t = 1 stands for the last time before it."""
    times = times.to(torch.float64).clamp_max(LAST)
    return times / (1 - times)


def check_shifting(settings: Mapping[str, Any], *, flow: bool) -> None:
    """Raise ConfigError for a shift that is not understood, or of a model that has none."""
    if not flow:
        told = [name for name, neutral in FLOW_ALONE.items() if settings.get(name) not in (None, neutral)]
        if told:
            raise ConfigError(
                f"{told[0]}={settings[told[0]]!r} belongs to prediction_type='flow_prediction', got "
                f"{settings['prediction_type']!r}"
            )
        return
    if settings.get("use_flow_sigmas") is False:
        raise ConfigError("use_flow_sigmas=False contradicts prediction_type='flow_prediction'; leave it out")
    shifts = {settings.get(name, 1.0) for name in ("shift", "flow_shift")} - {1.0}
    if len(shifts) > 1 or not all(isinstance(s, (int, float)) and 0 < s < math.inf for s in shifts):
        raise ConfigError(
            f"shift={settings.get('shift', 1.0)!r}, flow_shift={settings.get('flow_shift', 1.0)!r}: pass one positive number"
        )
    kind, end = settings.get("time_shift_type") or "exponential", settings.get("shift_terminal") or 0.0
    if kind not in KINDS or not 0 <= end < 1:
        raise ConfigError(
            f"time_shift_type must be one of {', '.join(KINDS)} and shift_terminal inside [0, 1), got {kind!r} and {end!r}"
        )


def shifted(settings: Mapping[str, Any], times: Tensor, mu: float | None) -> Tensor:
    """t' = s·t / (1 + (s - 1)·t), float64, with s = shift; with use_dynamic_shifting exp(mu), or mu where the kind is linear.

    Where there is a shift_terminal, 1 - t' is scaled to end there. Esser et al. 2024 (arXiv:2403.03206).
    """
    s = _shift(settings)
    if settings.get("use_dynamic_shifting") and mu is not None:
        s = float(mu) if settings.get("time_shift_type") == "linear" else math.exp(mu)
    times = s * times / (1 + (s - 1) * times)
    end = settings.get("shift_terminal")
    return 1 - (1 - times) * (1 - end) / (1 - times[-1]) if end else times


def _shift(settings: Mapping[str, Any]) -> float:
    return 1.0 if settings.get("use_dynamic_shifting") else float(settings.get("shift", 1.0))


def shifts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say of a flow, by the name of either family of diffusers' classes, what one of them said."""
    told = next((settings[name] for name in ("shift", "flow_shift") if settings.get(name, 1.0) != 1.0), None)
    return {"use_flow_sigmas": True} | ({} if told is None else {"shift": told, "flow_shift": told})


def flow_times(settings: Mapping[str, Any], count: int, mu: float | None) -> Tensor:
    """Times t, descending float64 (count,), as FlowMatchEulerDiscreteScheduler spaces them: from the wished range, 1 to its
    first training step, equally, then shifted.
    """
    ends = [settings.get(name) for name in ("sigma_max", "sigma_min")]
    first, last = (None if end is None else end / (1 + end) for end in ends)
    lowest = 1 / settings["num_train_timesteps"]
    lowest = _shift(settings) * lowest / (1 + (_shift(settings) - 1) * lowest)
    times = torch.linspace(first or 1.0, last or lowest, count, dtype=torch.float64, device="cpu")
    return shifted(settings, times, mu)


def flow_midpoints(levels: Tensor) -> list[list[float]]:
    """r of each interval of noise levels (N + 1,), m = sigma_next^r sigma^(1-r): 1/2, or less where m would be below sigma/2.

    An interval's D is D(x) + sigma/m·(D(m) - D(x)): towards t = 1 r = 1/2 multiplies a small difference by hundreds.
    """
    ratio = (levels[:-1] / levels[1:]).log2()
    return [[min(0.5, 1 / r)] for r in ratio.tolist()]


def check_mu(settings: Mapping[str, Any], mu: float | None, *, flow: bool) -> None:
    """Raise ConfigError for a mu that is missing, or of a model that has none. Without use_dynamic_shifting it says nothing:
    pipelines pass it all the same.
    """
    if mu is not None and not flow:
        raise ConfigError(f"mu={mu!r} shifts the times of a flow-matching model, this one is not; leave it out")
    if mu is None and settings.get("use_dynamic_shifting"):
        raise ConfigError("use_dynamic_shifting needs set_timesteps(..., mu=...), the shift for this number of tokens")
    if mu is not None and not math.isfinite(mu):
        raise ConfigError(f"mu must be finite, got {mu!r}")
