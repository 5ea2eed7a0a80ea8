"""What a diffusers scheduler says of the network it was trained with. Read by attribute: nothing is imported.

Every field of its configuration is read, or known not to change D, or refused by name: D is the scheduler's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.adapters.family import Family
from amed_engine.adapters.flow import Flow
from amed_engine.adapters.karras import EDM
from amed_engine.errors import ConfigError

NAMES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
# A zero terminal signal-to-noise ratio has an infinite sigma; the last level is then this far from it, as in diffusers, or
# farther where the one before it is.
SMALLEST = 2.0**-24


def _fields(names: str) -> frozenset[str]:
    return frozenset(names.split())


CLASSES = {
    "discrete": """CogVideoXDDIM CogVideoXDPM DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep
        DPMSolverSDE DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete
        KDPM2Discrete LMSDiscrete PNDM SASolver UnCLIP UniPCMultistep""",
    "edm": "AMED EDMDPMSolverMultistep EDMEuler",  # AMED with alphas_cumprod, or of a flow, is "discrete"
    "flow": "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM LTXEulerAncestralRF",
}
KINDS = {f"{name}Scheduler": kind for kind, names in CLASSES.items() for name in names.split()}

# How a scheduler itself steps, where, and with what noise: the network means the same whatever these say.
STEPPING = _fields(
    """afs algorithm_type corrector_order disable_corrector euler_at_final final_sigmas_type guidance_scale lambda_min_clipped
    lower_order_final mean midpoints noise_levels noise_sampler_seed predict_x0 predictor_order rho set_alpha_to_one
    sigma_schedule skip_prk_steps solver solver_options solver_order solver_p solver_type steps_offset tau_func
    timestep_spacing use_beta_sigmas use_exponential_sigmas use_karras_sigmas use_lu_lambdas variance_type"""
)
# Those that AMEDScheduler takes too. They hold where it was told them itself, in its entry `OWN_SETTINGS`: what the
# configuration of another class says is of that class's own steps.
SPACING = _fields("steps_offset timestep_spacing use_beta_sigmas use_exponential_sigmas use_karras_sigmas")
# Of the times at which flow models are sampled; `shift_of` reads what it can.
SHIFTING = _fields(
    """base_image_seq_len base_shift flow_shift max_image_seq_len max_shift shift shift_terminal time_shift_type
    use_dynamic_shifting"""
)
# Say nothing where clip_sample and thresholding are off.
LIMITS = _fields("clip_sample_range dynamic_thresholding_ratio sample_max_value")
# What the network was trained for.
MODEL = _fields(
    """beta_end beta_schedule beta_start num_train_timesteps prediction_type sigma_data sigma_max sigma_min trained_betas"""
)

READ = {
    "discrete": STEPPING | SHIFTING | LIMITS | MODEL | _fields("rescale_betas_zero_snr snr_shift_scale timestep_type"),
    "edm": STEPPING | LIMITS | MODEL,
    "flow": STEPPING | SHIFTING | {"num_train_timesteps", "eta", "s_noise", "stochastic_sampling", "upscale_mode"},
}

# The entry of AMEDScheduler's configuration that holds for it in the place of what other classes read there.
OWN_SETTINGS = "_amed"

_THRESHOLD = "D is the network's own here: set it to False, and put amed_engine.adapters.Thresholded round the denoiser"
_CLIP = (
    "D is the network's own here, which no step clips: pass scheduler=type(scheduler).from_config(scheduler.config, "
    "clip_sample=False); what keeps D in -1 .. 1 is amed_engine.adapters.Thresholded round the denoiser"
)
_SHIFTED = "its betas are shifted; pass snr_shift_scale=None and trained_betas, those of the scheduler's alphas_cumprod"
_LEVELS = "pass the noise levels themselves, as Sampler(schedule=...)"
# Fields that only one value of is understood, and what to do about another.
NEUTRAL: dict[str, tuple[Any, str]] = {
    "thresholding": (False, _THRESHOLD),
    "clip_sample": (False, _CLIP),
    "use_flow_sigmas": (False, "it belongs to prediction_type='flow_prediction'"),
    "timestep_type": ("discrete", "'continuous' is known with prediction_type='v_prediction' alone"),
    "interpolation_type": ("linear", "its levels are not those of the steps that the network is told then"),
    "invert_sigmas": (False, "its network is told 1 - t: wrap a function (x, t) -> prediction that turns time round"),
    "snr_shift_scale": (None, _SHIFTED),
    "scale_factors": (None, "its samples change their size on the way: sample it with its own pipeline"),
}


class Told(NamedTuple):
    """What is predicted, as `wrap` knows it; the family, None of discrete steps, whose betas may be given; the range of
    noise levels that is wished.
    """

    prediction: str
    family: Family | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None


def told_by(scheduler: Any) -> Told:
    """What a scheduler tells of its network. Raises ConfigError for one that is not known, or a field that is not."""
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"scheduler must be a diffusers scheduler itself, not its config, got {type(scheduler).__name__}"
        )
    kind, name, own = _kind(scheduler), type(scheduler).__name__, _own_fields(scheduler, config)
    if kind == "flow":
        check_fields(name, own, READ["flow"])
        return Told("flow", _flow(name, own))
    if kind == "edm":
        check_fields(name, own, READ["edm"])
        return Told("edm", edm_of(name, own))
    return _discrete(scheduler, name, own)


def _kind(scheduler: Any) -> str:
    """Raises ConfigError for a scheduler that is not known."""
    names = [ancestor.__name__ for ancestor in type(scheduler).__mro__]
    known = [KINDS[name] for name in names if name in KINDS]
    if "AMEDScheduler" in names and (has_betas(scheduler) or scheduler.config.get("use_flow_sigmas")):
        return "discrete"
    if known:
        return known[0]
    if "SchedulerMixin" in names:
        raise ConfigError(
            f"{names[0]} is not known: what its network predicts and is told is not read; leave scheduler out and pass "
            f"prediction=..., with betas=... or a Family, and for AMEDScheduler its own settings; known are "
            f"{', '.join(sorted(KINDS))}"
        )
    # What is no class of diffusers is judged by its name and its fields.
    return "flow" if names[0].startswith("FlowMatch") else "edm" if names[0].startswith("EDM") else "discrete"


def _own_fields(scheduler: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the class itself has: others are left from the class that the configuration came from."""
    ancestors = type(scheduler).__mro__
    if not any(ancestor.__name__ == "SchedulerMixin" for ancestor in ancestors):
        return dict(config)
    if any(ancestor.__name__ == "AMEDScheduler" for ancestor in ancestors):
        config = in_effect(config)
    own = {"_use_default_values"}.union(*(inspect.signature(ancestor.__init__).parameters for ancestor in ancestors))
    if type(scheduler).__name__.startswith("CogVideoX"):
        own.remove("clip_sample")  # which its step does not look at
    return {name: value for name, value in config.items() if name in own}


def in_effect(config: Any) -> Any:
    """AMEDScheduler's configuration as it holds for AMEDScheduler itself; what is none as it is."""
    if not isinstance(config, Mapping):
        return config
    own = config.get(OWN_SETTINGS, {})
    defaults = [name for name in config.get("_use_default_values", ()) if name not in own]
    said = {name: value for name, value in config.items() if name not in SPACING}
    return {**said, **own, "_use_default_values": defaults}


def check_fields(name: str, config: Mapping[str, Any], read: Collection[str]) -> None:
    """Raise ConfigError for the first field that is neither read nor known to say nothing at this value.

    To clip is DDIM's and DDPM's default, whatever the model: only where a configuration says so it is refused.
    """
    unsaid = {"clip_sample"} & set(config.get("_use_default_values", ()))
    for field, value in config.items():
        if field in unsaid:
            continue
        if field in NEUTRAL and field not in read:
            neutral, instead = NEUTRAL[field]
            if value != neutral:
                raise ConfigError(f"{name} has {field}={value!r}, expected {neutral!r}: {instead}")
        elif field not in read and not field.startswith("_"):
            raise ConfigError(
                f"{name} has {field}={value!r}, which is not understood here; take it out of the configuration if it says "
                "nothing of the network, else pass prediction=... and betas=... instead of the scheduler"
            )


def _discrete(scheduler: Any, name: str, config: Mapping[str, Any]) -> Told:
    told = config.get("prediction_type")
    if told not in NAMES:
        raise ConfigError(
            f"{name} has prediction_type={told!r}; known are {', '.join(NAMES)}; pass prediction=... instead of scheduler"
        )
    if told == "flow_prediction":
        if not config.get("use_flow_sigmas"):
            raise ConfigError(
                f"{name} has prediction_type={told!r} without use_flow_sigmas=True; pass prediction='flow'"
            )
        check_fields(name, config, READ["discrete"] | {"use_flow_sigmas"})
        return Told("flow", _flow(name, config))
    low, high = config.get("sigma_min"), config.get("sigma_max")
    if config.get("timestep_type") == "continuous" and told == "v_prediction":
        check_fields(name, config, READ["discrete"])
        ends = ((1 - betas_of(scheduler)) / betas_of(scheduler)).sqrt()[[0, -1]].tolist()
        return Told("edm", EDM(1.0, low or ends[0], high or ends[1], v_prediction=True))
    check_fields(name, config, READ["discrete"] - {"timestep_type"})
    _check_betas(scheduler, name, config)
    return Told(NAMES[told], None, low, high)


def _check_betas(scheduler: Any, name: str, config: Mapping[str, Any]) -> None:
    """Raise ConfigError for betas that are not those of num_train_timesteps steps from data to noise."""
    if not has_betas(scheduler):
        return
    alphas, steps = betas_of(scheduler), config.get("num_train_timesteps")
    if steps is not None and steps != len(alphas):
        raise ConfigError(
            f"{name} has num_train_timesteps={steps} and trained_betas of {len(alphas)} steps; make them the same"
        )
    if config.get("rescale_betas_zero_snr") and not bool((alphas.diff() < 0).all()):
        raise ConfigError(
            f"{name} has rescale_betas_zero_snr=True with betas so large that its alphas_cumprod do not decrease to the end; "
            "pass prediction=... and betas=... instead of scheduler"
        )


def _flow(name: str, config: Mapping[str, Any]) -> Flow:
    steps = config.get("num_train_timesteps", 1000)
    if not (isinstance(steps, (int, float)) and 0 < steps < math.inf):
        raise ConfigError(
            f"{name} has num_train_timesteps={steps!r}, expected a positive number: a network is told steps·t"
        )
    flow = Flow(steps)
    flow.sigma_min = config.get("sigma_min") or flow.sigma_min
    flow.sigma_max = config.get("sigma_max") or flow.sigma_max
    return flow


def edm_of(name: str, config: Mapping[str, Any]) -> EDM:
    """The family of an EDM configuration, with its range. Raises ConfigError."""
    told = config.get("prediction_type", "epsilon")
    if told not in ("epsilon", "v_prediction"):
        raise ConfigError(f"{name} has prediction_type={told!r} of EDM's, expected epsilon or v_prediction")
    ends = {field: config.get(field) for field in ("sigma_min", "sigma_max")}
    known = {field: float(value) for field, value in ends.items() if value is not None}
    data = {"sigma_data": config["sigma_data"]} if "sigma_data" in config else {}
    return EDM(**data, **known, v_prediction=told == "v_prediction")


def has_betas(scheduler: Any) -> bool:
    return isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor)


def betas_of(scheduler: Any) -> Tensor:
    """alphas_cumprod of the scheduler, float64. Raises ConfigError where it has none."""
    if not has_betas(scheduler):
        raise ConfigError(f"{type(scheduler).__name__} has no alphas_cumprod; pass betas=... as well")
    alphas = scheduler.alphas_cumprod.detach().to("cpu", torch.float64).clone()
    if len(alphas) > 1 and alphas[-1] == 0:
        alphas[-1] = nearly_zero(alphas)
    return alphas


def nearly_zero(alphas: Tensor) -> Tensor | float:
    """What stands for alphas_cumprod 0 of the last step."""
    return SMALLEST if alphas[-2] > SMALLEST else alphas[-2] / 4


def shift_of(scheduler: Any, shape: Sequence[int], patch: int = 2) -> float:
    """The shift of a flow-matching scheduler for samples (C, H, W), as `flow_levels` takes it.

    A fixed one, or exp(mu) with mu linear in the number of tokens of patch x patch pixels (Flux):

        mu = base_shift + (tokens - base_seq)/(max_seq - base_seq)·(max_shift - base_shift)

    Raises ConfigError for another scheduler, or one whose times are not shifted thus.
    """
    config: Any = getattr(scheduler, "config", None) or {}
    if not type(scheduler).__name__.startswith("FlowMatch") and not config.get("use_flow_sigmas"):
        raise ConfigError(f"a shift is that of a flow-matching scheduler of diffusers, got {type(scheduler).__name__}")
    _check_shifted(type(scheduler).__name__, config)
    if not config.get("use_dynamic_shifting"):
        fixed = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0)
        return float(getattr(scheduler, "_shift", fixed))  # what set_shift sets is not in the configuration
    if config.get("time_shift_type", "exponential") != "exponential" or len(shape) != 3:
        raise ConfigError(
            f"need an exponential shift and a shape (C, H, W), got {config.get('time_shift_type')!r}, {tuple(shape)}"
        )
    tokens = shape[1] * shape[2] / patch**2
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(low + (tokens - least) / (most - least) * (high - low))


def _check_shifted(name: str, config: Mapping[str, Any]) -> None:
    """Raise ConfigError for times that are more than shifted."""
    for field in ("shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(field):
            raise ConfigError(f"{name} has {field}={config[field]!r}: its times are no shift of equal steps; {_LEVELS}")
