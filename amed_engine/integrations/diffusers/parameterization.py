"""How a diffusers model is asked and understood at a noise level: EDM's networks, and those of discrete steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.solvers.plan import clamp_range
from amed_engine.solvers.schedule import DiscreteTime, logsnr, polynomial

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Parameterization:
    """Between a network F(c_in·x; timestep) and the denoised image, at noise levels () or (B,).

    EDM (time None), with s = sigma_data:  c_in = 1/sqrt(sigma² + s²), timestep = log(sigma)/4,
        D = s²/(sigma² + s²) x ± sigma·s/sqrt(sigma² + s²) F      (+ for epsilon, - for v_prediction)
    Discrete steps (time given):           c_in = 1/sqrt(sigma² + 1), timestep = the training step of that noise level,
        D = x - sigma F                                           (epsilon)
        D = x/(sigma² + 1) - sigma/sqrt(sigma² + 1) F             (v_prediction)
    and D = F for sample.
    """

    prediction_type: str
    sigma_data: float
    time: DiscreteTime | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Parameterization:
        """From a scheduler's configuration; one with a beta_schedule or trained_betas is of discrete steps."""
        if config["prediction_type"] not in PREDICTIONS:
            raise ConfigError(
                f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {config['prediction_type']!r}"
            )
        betas = _betas(config)
        if betas is None:
            return cls(config["prediction_type"], float(config["sigma_data"]))
        return cls(config["prediction_type"], 1.0, DiscreteTime.of((1 - betas).cumprod(0)))

    def range(self, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
        """The wished range of noise levels, inside that of a discrete model."""
        if self.time is None:
            return clamp_range(0.002 if sigma_min is None else sigma_min, 80.0 if sigma_max is None else sigma_max)
        low, high = self.time.sigma(self.time.grid()[[0, -1]]).tolist()
        return max(low, sigma_min or low), min(high, sigma_max or high)

    def levels(self, schedule: str, count: int, low: float, high: float, rho: float) -> Tensor:
        """`count` noise levels, (count,) float64: "karras" or "exponential"."""
        if schedule not in ("karras", "exponential"):
            raise ConfigError(f"sigma_schedule must be karras or exponential, got {schedule!r}; pass sigmas for others")
        return polynomial(count, low, high, rho) if schedule == "karras" else logsnr(count, low, high)

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is told of a noise level."""
        if self.time is None:
            return sigma.log() / 4
        moved = DiscreteTime(self.time.log_alpha.to(sigma.device))
        return (moved.time(sigma) * len(moved.log_alpha) - 1).to(sigma.dtype)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level of a timestep, float64."""
        timestep = timestep.to(torch.float64)
        if self.time is None:
            return (4 * timestep).exp()
        return self.time.sigma((timestep.cpu() + 1) / len(self.time.log_alpha))

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The network's input c_in·x."""
        return x / (_like(sigma, x) ** 2 + self.sigma_data**2).sqrt()

    def denoised(self, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        """D from the network's output at x."""
        if self.prediction_type == "sample":
            return output
        sigma = _like(sigma, x)
        if self.time is not None and self.prediction_type == "epsilon":
            return x - sigma * output
        s, variance = self.sigma_data, sigma**2 + self.sigma_data**2
        c_out = sigma * s / variance.sqrt()
        return x * (s**2 / variance) + (c_out if self.prediction_type == "epsilon" else -c_out) * output


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    """Ready to multiply x: one level for all stays a scalar on the host, in its own precision, and is never copied."""
    return sigma if sigma.dim() == 0 else sigma.to(x.device, x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def translated(config: Any, parameters: Mapping[str, inspect.Parameter]) -> Any:
    """A scheduler's configuration for a class with these parameters. Raises ConfigError where it would mean something else.

    diffusers puts the defaults of the new class in the place of those of the old one. These say, too, what a network was
    trained for, so only those that agree may be replaced. What is no configuration is for diffusers to refuse.
    """
    if not isinstance(config, Mapping):
        return config
    if "shift" in config or config.get("use_flow_sigmas"):
        raise ConfigError(
            "this configuration is of a flow-matching model, AMEDScheduler is for epsilon, v and x0 prediction: sample it "
            "with amed_engine.adapters.wrap_pipeline and Sampler"
        )
    if config.get("rescale_betas_zero_snr"):
        raise ConfigError(
            "a zero terminal signal-to-noise ratio has no highest noise level; pass trained_betas instead"
        )
    defaults = config.get("_use_default_values", [])
    agree = [name for name in defaults if name not in parameters or config.get(name) == parameters[name].default]
    return {**config, "_use_default_values": agree}


def _betas(config: Mapping[str, Any]) -> Tensor | None:
    """The noise added per training step, (num_train_timesteps,) float64; None for a model without steps."""
    name, steps = config["beta_schedule"], config["num_train_timesteps"]
    if config["trained_betas"] is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    if name is None:
        return None
    if name not in BETA_SCHEDULES:
        raise ConfigError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)} or None, got {name!r}")
    if name == "squaredcos_cap_v2":
        alpha = (torch.linspace(0, 1, steps + 1, dtype=torch.float64).add(0.008) / 1.008 * torch.pi / 2).cos() ** 2
        return (1 - alpha[1:] / alpha[:-1]).clamp_max(0.999)
    start, end, power = config["beta_start"], config["beta_end"], 2 if name == "scaled_linear" else 1
    return torch.linspace(start ** (1 / power), end ** (1 / power), steps, dtype=torch.float64) ** power
