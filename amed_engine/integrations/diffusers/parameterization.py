"""How a diffusers model is asked and understood at a noise level: EDM's networks, those of discrete steps and of flows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from amed_engine.adapters.discrete import DiscreteSteps, alphas_cumprod
from amed_engine.adapters.flow import Flow
from amed_engine.adapters.karras import EDM
from amed_engine.adapters.schedulers import (
    KINDS,
    LIMITS,
    MODEL,
    NAMES,
    NEUTRAL,
    OWN_SETTINGS,
    READ,
    SPACING,
    check_fields,
    edm_of,
    nearly_zero,
)
from amed_engine.errors import ConfigError
from amed_engine.solvers.plan import own_range

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}  # here: there
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
# What `wrap` reads of a scheduler itself, and a configuration alone does not tell.
UNREAD = {"snr_shift_scale", "timestep_type"}
# How far rounding leads from a training step.
ROUNDING = 1e-6
# Fields of a model of discrete steps alone, or of EDM's.
ONE_KIND = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "sigma_data"}
KNOWN = set(NEUTRAL).union(*READ.values())
# The flow-matching classes that step without noise; of the first, one in memory is known by this field.
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
FLOW_FIELD = "stochastic_sampling"
# Settings that stand in AMEDScheduler's configuration only where somebody said them.
FLOW_SETTINGS = {"flow_shift", "shift", "shift_terminal", "time_shift_type", "use_dynamic_shifting", "use_flow_sigmas"}
OPTIONAL = SPACING | LIMITS | FLOW_SETTINGS | {"clip_sample", "rescale_betas_zero_snr", "thresholding"}
# Fields by the names of other classes that say where this one begins and ends, not what the network is.
OWN = {"final_sigmas_type", "rho", "sigma_max", "sigma_min", "sigma_schedule"}


@dataclass(frozen=True)
class Parameterization:
    """Between a network F(scale·x; timestep) and D = skip·x + out·F, at noise levels () or (B,), as its family has them.

    D = F for sample. A flow's samples are x/(1 + sigma), (1 - t)·x0 + t·n: `opened` and `closed` lead to x and back.
    """

    prediction_type: str
    family: EDM | DiscreteSteps | Flow

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Parameterization:
        """From a scheduler's configuration; one with a beta_schedule or trained_betas is of discrete steps."""
        told = config["prediction_type"]
        if told not in PREDICTIONS:
            raise ConfigError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {told!r}")
        if told == "flow_prediction":
            return cls(told, Flow(config["num_train_timesteps"]))
        alphas = _alphas(config)
        _check_one_kind(config, discrete=alphas is not None)
        if alphas is not None:
            return cls(told, DiscreteSteps(NAMES[told], alphas))
        trained = "epsilon" if told == "sample" else told  # of D itself there is nothing to precondition but the input
        return cls(told, edm_of("AMEDScheduler", {**config, "prediction_type": trained}))

    @property
    def flow(self) -> bool:
        return isinstance(self.family, Flow)

    def range(self, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
        """The wished range of noise levels, inside that of a discrete model."""
        low, high = self.family.sigma_min, self.family.sigma_max
        if isinstance(self.family, EDM):
            return own_range(low, high)
        return own_range(max(low, sigma_min or low), min(high, sigma_max or high))

    def unsaid(self, config: Mapping[str, Any]) -> dict[str, None]:
        """The ends of the range that a configuration leaves to the defaults, which are EDM's: another model has its own."""
        ends = () if isinstance(self.family, EDM) else ("sigma_min", "sigma_max")
        return dict.fromkeys(end for end in ends if end in config.get("_use_default_values", ()))

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is told of a noise level; a training step as the whole number that it is."""
        time = self.family.to(sigma.device).time(sigma)
        if isinstance(self.family, DiscreteSteps):
            whole = time.round()
            time = torch.where((time - whole).abs() < ROUNDING, whole, time)
        return time.to(sigma.dtype)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level of a timestep, float64."""
        return self.family.cpu().sigma(timestep.cpu())

    def opened(self, sample: Tensor, sigma: Tensor) -> Tensor:
        """The state x of a sample, in memory of its own; float64 for a flow, whose sigma has no end."""
        precision = torch.float64 if self.flow else torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(precision, copy=True)
        return x * (1 + _like(sigma, x)) if self.flow else x

    def closed(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The sample of a state x; where sigma is 0 both are the data."""
        return x / (1 + _like(sigma, x)) if self.flow else x

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The network's input scale·x."""
        return x * self.family.mix(_like(sigma, x))[2]

    def denoised(self, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        """D from the network's output at x, in memory of its own."""
        if self.prediction_type == "sample":
            return output.clone()
        skip, out, _ = self.family.mix(_like(sigma, x))
        return skip * x + out * output


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    """Ready to multiply x: one level for all stays a scalar on the host, in its own precision, and is never copied."""
    return sigma if sigma.dim() == 0 else sigma.to(x.device, x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def translated(config: Any, changes: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> Any:
    """A scheduler's configuration for a class with these parameters. Raises ConfigError where it, or what is changed in it,
    would mean something else.

    diffusers puts the defaults of the new class in the place of those of the old one. These say, too, what a network was
    trained for, so only those that agree may be replaced. What a configuration leaves out is the default of the class that it
    names; what other classes left in it says nothing. What is no configuration is for diffusers to refuse.
    """
    if not isinstance(config, Mapping):
        return config
    own = _parameters_of(config)
    left = (KNOWN - set(own)) if own else set()  # from classes that the configuration has been through before
    unsaid = {name: own[name].default for name in MODEL if name in own}
    config = {**unsaid, **config, **{name: parameters[name].default for name in left & ONE_KIND}}
    _check_understood({**{name: config[name] for name in config if name not in left}, **changes}, parameters)
    config = _without(config, (left & OPTIONAL) - SPACING, changes)
    defaults = config.get("_use_default_values", [])
    kept = set(parameters) - SPACING
    agree = [name for name in defaults if name not in kept or config.get(name) == parameters[name].default]
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if _is_flow(config) else {}
    return {**config, **flow, "_use_default_values": agree}


def _without(config: Mapping[str, Any], left: set[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what others left, the shift of the other name than the one that is changed, and a clip_sample
    that nobody said: to clip is DDIM's and DDPM's default, whatever the model."""
    shifts = {"shift", "flow_shift"}
    dropped = left | (shifts if shifts & set(changes) else set())
    dropped |= {"clip_sample"} & set(config.get("_use_default_values", ()))
    return {name: value for name, value in config.items() if name not in dropped}


def _is_flow(config: Mapping[str, Any]) -> bool:
    in_memory = "_class_name" not in config and FLOW_FIELD in config and "beta_schedule" not in config
    return config.get("_class_name") in FLOWS or config.get("prediction_type") == "flow_prediction" or in_memory


def _parameters_of(config: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    """Those of the class that a configuration names; none where that is not known, or lacks a package that it needs."""
    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None) if name in KINDS else None
    return {} if kind is None or "dummy" in kind.__module__ else inspect.signature(kind.__init__).parameters


def _check_understood(config: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raise ConfigError for a configuration of another kind of model, or with a field that would be lost."""
    name = config.get("_class_name", "this configuration")
    flow = _is_flow(config)
    if not flow and ("shift" in config or config.get("use_flow_sigmas") or KINDS.get(name) == "flow"):
        raise ConfigError(
            f"{name} is of a flow-matching model, and not one of {', '.join(FLOWS)} or of prediction_type='flow_prediction': "
            "name its class in '_class_name' if it is, else sample it with amed_engine.adapters.wrap_pipeline and Sampler"
        )
    if flow and KINDS.get(name) == "discrete" and not config.get("use_flow_sigmas"):
        raise ConfigError(f"{name} has prediction_type='flow_prediction' without use_flow_sigmas=True; set it")
    if "_class_name" in config and name not in KINDS:
        raise ConfigError(f"{name} is not known; pass the settings of the model to AMEDScheduler(...) themselves")
    if config.get("timestep_type") == "continuous":
        raise ConfigError(
            f"{name} has timestep_type='continuous'; with v_prediction that is AMEDScheduler(sigma_data=1.0, "
            "prediction_type='v_prediction', sigma_min=..., sigma_max=...), of others nothing is known"
        )
    if "trained_betas" in config and "prediction_type" not in config:
        raise ConfigError(
            f"{name} does not say what the network predicts; add prediction_type, or pass AMEDScheduler(...)"
        )
    if {"solver_order", "sigma_data"} <= set(config) and not {"algorithm_type", "beta_schedule"} & set(config):
        raise ConfigError(
            f"{name} is CosineDPMSolverMultistepScheduler's, whose network is told 2/pi·atan(sigma): not known"
        )
    check_betas(config.get("trained_betas"), config.get("num_train_timesteps", 1000))
    check_fields(str(name), config, (READ["discrete"] - UNREAD) | set(parameters) | (READ["flow"] if flow else set()))


def _check_one_kind(config: Mapping[str, Any], *, discrete: bool) -> None:
    """Raise ConfigError for a setting of the other kind of model, which would say nothing of this one."""
    others = {"sigma_data": 0.5} if discrete else {"beta_start": 0.0001, "beta_end": 0.02}
    for field, default in others.items():
        if config[field] != default:
            instead = "leave it out, or these" if discrete else "pass one of these as well"
            raise ConfigError(
                f"{field}={config[field]} says nothing of a model with{'' if discrete else 'out'} a beta_schedule or "
                f"trained_betas; {instead}"
            )


def given_back(config: Mapping[str, Any], changes: Mapping[str, Any], made: Any) -> dict[str, Any]:
    """The entries of the configuration of `made`, of what `translated` returned with these changes, that leave each class
    its own range and end.

    diffusers reads a configuration by name: under the common ones stands what other classes said, what they left to defaults
    as such, and what is of this class alone in `OWN_SETTINGS`, which the others pass on unread.
    """
    own = {**config.get(OWN_SETTINGS, {}), **{name: changes[name] for name in sorted((OWN | SPACING) & set(changes))}}
    carried = {n: config[n] for n in sorted(SPACING & set(config)) if n not in config.get("_use_default_values", ())}
    if not own and not carried:
        return {}
    ends = () if isinstance(made.model.family, EDM) else {"sigma_min", "sigma_max"}
    parameters = inspect.signature(type(made).__init__).parameters
    lost = own.keys() - config.keys() - SPACING
    unsaid = {name: None if name in ends else parameters[name].default for name in sorted(lost)}
    defaults = {*made.config.get("_use_default_values", ()), *unsaid}
    defaults |= (own.keys() - SPACING) & set(config.get("_use_default_values", ()))
    said = {name: config[name] for name in (own.keys() & config.keys()) - SPACING}
    entry = {OWN_SETTINGS: own} if own else {}
    return {**carried, **said, **unsaid, **entry, "_use_default_values": sorted(defaults)}


def _alphas(config: Mapping[str, Any]) -> Tensor | None:
    """alphas_cumprod of the training steps, (num_train_timesteps,) float64; None for a model without steps."""
    alphas = _trained(config)
    if not config.get("rescale_betas_zero_snr"):
        return alphas
    if alphas is None:
        raise ConfigError(
            "rescale_betas_zero_snr=True says nothing of a model without a beta_schedule or trained_betas"
        )
    return zero_terminal(alphas)


def zero_terminal(alphas: Tensor) -> Tensor:
    """alphas_cumprod (steps,) with sqrt(alpha) shifted and scaled to end at 0, where it starts as before; the last one is what
    stands for 0, see `SMALLEST`. Lin et al. 2023 (arXiv:2305.08891), algorithm 1.
    """
    root = alphas.sqrt()
    alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alphas[-1] = nearly_zero(alphas)
    return alphas


def check_betas(betas: Any, steps: int) -> None:
    """Raise ConfigError for betas of another number of training steps."""
    if betas is not None and len(betas) != steps:
        raise ConfigError(
            f"trained_betas are of {len(betas)} steps, num_train_timesteps is {steps}; make them the same"
        )


def _trained(config: Mapping[str, Any]) -> Tensor | None:
    name, steps = config["beta_schedule"], config["num_train_timesteps"]
    if config["trained_betas"] is not None:
        check_betas(config["trained_betas"], steps)
        return (1 - torch.as_tensor(config["trained_betas"], dtype=torch.float64, device="cpu")).cumprod(0)
    if name is None:
        return None
    if name == "exp":  # exp(-12 t) over the training, of beta at most 0.999
        return torch.full((steps,), max(math.exp(-12 / steps), 0.001), dtype=torch.float64, device="cpu").cumprod(0)
    if name not in BETA_SCHEDULES:
        known = ", ".join([*BETA_SCHEDULES, "exp"])
        raise ConfigError(f"beta_schedule must be one of {known} or None, got {name!r}")
    return alphas_cumprod(BETA_SCHEDULES[name], steps, config["beta_start"], config["beta_end"])
