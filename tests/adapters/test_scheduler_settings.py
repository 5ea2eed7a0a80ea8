"""Every scheduler of diffusers, at every field of its configuration: D is its own, or a ConfigError names what is not read."""

import inspect
from importlib.util import find_spec

import pytest
import torch

from amed_engine.adapters import wrap
from amed_engine.errors import ConfigError

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

pytestmark = pytest.mark.filterwarnings("ignore")
X = 2 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Network:
    """Keeps what it was given and told."""

    def __call__(self, x, t):
        self.x, self.t = x, t
        return 0.3 * x + 0.1


# ---- each scheduler's own D of a prediction: (scheduler, step, its state, prediction) -> D


def by_step(scheduler, i, x, raw):
    return scheduler.step(raw, scheduler.timesteps[i], x, return_dict=True).pred_original_sample


def by_conversion(scheduler, i, x, raw):
    scheduler._step_index = i
    converted = scheduler.convert_model_output(raw, sample=x)
    if scheduler.config.get("predict_x0", True) and scheduler.config.get("algorithm_type") != "deis":
        return converted
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i])
    return (x - sigma * converted) / alpha  # of the noise, which these work on


def of_pndm(scheduler, i, x, raw):
    """Its step to where alpha is 1."""
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    return scheduler._get_prev_sample(x, scheduler.timesteps[i], -1, raw)


def by_slope(scheduler, i, x, raw):
    """A deterministic step along dx/dsigma goes on to D."""
    if scheduler.config.get("stochastic_sampling"):
        return by_last_step(scheduler, i, x, raw)
    sigma, following = scheduler.sigmas[i : i + 2]
    return x - sigma * (scheduler.step(raw, scheduler.timesteps[i], x).prev_sample - x) / (following - sigma)


def by_last_step(scheduler, i, x, raw):
    """The step to sigma = 0."""
    scheduler.sigmas = torch.tensor([*scheduler.sigmas[: i + 1].tolist(), 0.0])
    return scheduler.step(raw, scheduler.timesteps[i], x, generator=torch.Generator()).prev_sample


REFUSED = None
OWN = {
    **dict.fromkeys(("CogVideoXDDIM", "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "UnCLIP"), by_step),
    **dict.fromkeys(("EDMEuler", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"), by_step),
    **dict.fromkeys(("KDPM2Discrete", "KDPM2AncestralDiscrete"), by_step),
    **dict.fromkeys(("DPMSolverMultistep", "DPMSolverSinglestep", "SASolver", "UniPCMultistep"), by_conversion),
    **dict.fromkeys(("DEISMultistep", "EDMDPMSolverMultistep"), by_conversion),
    "PNDM": of_pndm,
    "CogVideoXDPM": lambda s, i, x, raw: s.step(raw, None, s.timesteps[i], None, x)[1],
    **dict.fromkeys(("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"), by_slope),
    **dict.fromkeys(("FlowMatchLCM", "LTXEulerAncestralRF"), by_last_step),
    **dict.fromkeys(
        ("DDIMInverse", "DPMSolverMultistepInverse", "RePaint"), REFUSED
    ),  # other ways than from noise to data
    **dict.fromkeys(
        ("CMStochasticIterative", "LCM", "TCD", "SCM", "FlowMapEulerDiscrete", "Piflow"), REFUSED
    ),  # one jump
    **dict.fromkeys(("Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound", "VQDiffusion"), REFUSED),  # tokens
    **dict.fromkeys(("DDPMWuerstchen", "Helios", "HeliosDMD", "IPNDM", "KarrasVe", "MiniMaxH3"), REFUSED),
    **dict.fromkeys(("RFD4Proteina", "ScoreSdeVe"), REFUSED),
}
if find_spec("torchsde"):  # diffusers makes these with it alone
    OWN |= {"DPMSolverSDE": by_step, "CosineDPMSolverMultistep": REFUSED}
NEEDED: dict[str, dict] = {"Amused": {"mask_token_id": 1}, "VQDiffusion": {"num_vec_classes": 5}}
NEEDED["RFD4Proteina"] = {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0}


def exported():
    """{name without "Scheduler": class} of what this diffusers has and can make."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    classes = {name.removesuffix("Scheduler"): getattr(diffusers, name) for name in names}
    return {name: kind for name, kind in classes.items() if "dummy" not in kind.__module__}


def make(name, **options):
    """With what would clip D off; a default that no configuration says is not read."""
    kind = getattr(diffusers, f"{name}Scheduler")
    clips = "clip_sample" in inspect.signature(kind.__init__).parameters
    return kind(**{**({"clip_sample": False} if clips else {}), **NEEDED.get(name, {}), **options})


def is_flow(scheduler):
    name, own = type(scheduler).__name__, inspect.signature(type(scheduler).__init__).parameters
    by_field = "use_flow_sigmas" in own and scheduler.config["use_flow_sigmas"]
    return "FlowMatch" in name or "LTX" in name or by_field


def begin(scheduler):
    """A trajectory of ten steps; -> (i, the i-th level as sigma, the state of x0 + sigma·n = X there)"""
    dynamic = {"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(10, **dynamic)
    i = 4
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(i)
    if is_flow(scheduler):
        t = scheduler.sigmas[i].double()
        return i, t / (1 - t), X * (1 - t).float()
    if not hasattr(scheduler, "sigmas"):
        alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[i])].double()
        return i, ((1 - alpha) / alpha).sqrt(), X * alpha.sqrt().float()
    sigma = scheduler.sigmas[i].double()
    scaled = hasattr(scheduler, "_sigma_to_alpha_sigma_t") and not type(scheduler).__name__.startswith("EDM")
    return i, sigma, X / (1 + sigma**2).sqrt().float() if scaled else X


def check_own(name, scheduler):
    """What the network is given and told, and D, are the scheduler's."""
    network = Network()
    denoiser = wrap(network, scheduler=scheduler, shape=tuple(X.shape[1:]), bottleneck=None, verify=False)
    i, sigma, state = begin(scheduler)
    got = denoiser(X, sigma.expand(2).float()).x0
    given = (
        scheduler.scale_model_input(state, scheduler.timesteps[i]) if hasattr(scheduler, "scale_model_input") else state
    )
    torch.testing.assert_close(network.x, given, rtol=2e-4, atol=2e-4)
    told = float(scheduler.timesteps[i])
    step = 1 if scheduler.timesteps.dtype == torch.int64 else 0.2  # some round what they tell
    assert float(network.t[0]) == pytest.approx(told, abs=step * scheduler.config.num_train_timesteps / 1000, rel=1e-3)
    torch.testing.assert_close(got, OWN[name](scheduler, i, state, network(given, None)), rtol=1e-3, atol=1e-3)


def test_every_scheduler_has_a_verdict():
    assert set(exported()) == set(OWN)


@pytest.mark.parametrize("name", [name for name, own in OWN.items() if own is REFUSED])
def test_a_scheduler_that_is_not_known_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"{name}Scheduler is not known.* pass prediction="):
        wrap(Network(), scheduler=make(name))


KNOWN = [name for name, own in OWN.items() if own is not REFUSED]


@pytest.mark.parametrize("name", KNOWN)
def test_d_is_the_scheduler_s_own(name):
    check_own(name, make(name))


# ---- every field, one at a time

SOME_BETAS = torch.linspace(0.001, 0.03, 50).tolist()
SPACINGS, SHIFTS, SWITCH = ("leading", "trailing"), (3.0,), (True, False)
FIELDS = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis", "data_prediction"),
    "base_image_seq_len": (64,),
    "base_shift": (0.3,),
    "beta_end": (0.03,),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "beta_start": (0.001,),
    "clip_sample": SWITCH,
    "clip_sample_range": (0.1,),
    "corrector_order": (1,),
    "disable_corrector": ([0],),
    "dynamic_thresholding_ratio": (0.5,),
    "eta": (0.0,),
    "euler_at_final": SWITCH,
    "final_sigmas_type": ("zero", "sigma_min"),
    "flow_shift": SHIFTS,
    "interpolation_type": ("log_linear",),
    "invert_sigmas": SWITCH,
    "lambda_min_clipped": (-5.1,),
    "lower_order_final": SWITCH,
    "max_image_seq_len": (900,),
    "max_shift": (2.0,),
    "num_train_timesteps": (50, 500, 2000),
    "noise_sampler_seed": (3,),
    "predict_x0": SWITCH,
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction", "trigflow"),
    "predictor_order": (1,),
    "rescale_betas_zero_snr": SWITCH,
    "rho": (3.0,),
    "s_noise": (0.0,),
    "sample_max_value": (2.0,),
    "scale_factors": ([1.0, 2.0],),
    "set_alpha_to_one": SWITCH,
    "shift": SHIFTS,
    "shift_terminal": (0.1,),
    "sigma_data": (0.3, 1.0),
    "sigma_max": (10.0, 120.0),
    "sigma_min": (0.01, 0.5),
    "sigma_schedule": ("exponential",),
    "skip_prk_steps": SWITCH,
    "snr_shift_scale": (1.0, 2.0),
    "solver_order": (1,),
    "solver_p": (None,),
    "solver_type": ("heun", "bh1"),
    "steps_offset": (1,),
    "stochastic_sampling": SWITCH,
    "tau_func": (lambda t: 0.0,),
    "thresholding": SWITCH,
    "time_shift_type": ("linear",),
    "timestep_spacing": SPACINGS,
    "timestep_type": ("discrete", "continuous"),
    "trained_betas": (SOME_BETAS, torch.linspace(0.001, 0.03, 1000).tolist()),
    "upscale_mode": ("nearest",),
    "use_beta_sigmas": SWITCH,
    "use_dynamic_shifting": SWITCH,
    "use_exponential_sigmas": SWITCH,
    "use_flow_sigmas": SWITCH,
    "use_karras_sigmas": SWITCH,
    "use_lu_lambdas": SWITCH,
    "variance_type": ("fixed_large", "learned_range"),
}


def fields_of(name):
    own = inspect.signature(exported()[name].__init__).parameters if name in exported() else {}
    return [field for field in own if field != "self"]


def made_or_none(name, **options):
    """None where diffusers itself refuses."""
    try:
        scheduler = make(name, **options)
        begin(scheduler)
    except (ValueError, NotImplementedError, TypeError, IndexError, ZeroDivisionError):
        return None
    return make(name, **options)


def refusal_of(name, scheduler):
    """What the ConfigError says; None where D is the scheduler's own, or its own step does not know the setting."""
    try:
        check_own(name, scheduler)
    except ConfigError as error:
        return str(error)
    except (ValueError, NotImplementedError, RuntimeError, TypeError):
        if "diffusers" not in inspect.trace()[-1].filename:
            raise
    return None


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in KNOWN for field in fields_of(name)])
def test_every_field_is_read_or_refused_by_name(name, field):
    default = inspect.signature(exported()[name].__init__).parameters[field].default
    made = [made_or_none(name, **{field: value}) for value in FIELDS[field] if value != default]
    refusals = [refusal_of(name, scheduler) for scheduler in made if scheduler is not None]
    assert all(refusal is None or field in refusal for refusal in refusals)


FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SVD = {**SD, "prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0}
TOGETHER = [
    *((name, FLOW_SIGMAS) for name in ("DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver")),
    *(
        ("UniPCMultistep", {**FLOW_SIGMAS, **more})
        for more in ({}, {"num_train_timesteps": 500}, {"shift_terminal": 0.1})
    ),
    *(("EulerDiscrete", {**SVD, **more}) for more in ({}, {"use_karras_sigmas": True})),
    *(
        (name, {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
        for name in ("DDIM", "EulerDiscrete")
    ),
    ("EDMEuler", {"sigma_data": 1.0, "prediction_type": "v_prediction", "sigma_max": 120.0}),
    ("EDMDPMSolverMultistep", {"sigma_data": 1.0, "prediction_type": "v_prediction", "sigma_schedule": "exponential"}),
    ("CogVideoXDDIM", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "clip_sample": True}),
    ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True, "shift_terminal": 0.1, "time_shift_type": "linear"}),
]


@pytest.mark.parametrize(("name", "options"), TOGETHER, ids=[f"{name}-{i}" for i, (name, _) in enumerate(TOGETHER)])
def test_fields_that_published_models_set_together_are_read(name, options):
    check_own(name, make(name, **options))


def test_fields_left_from_another_class_say_nothing_of_this_one():
    present = make("UniPCMultistep", **FLOW_SIGMAS)
    check_own("EulerDiscrete", diffusers.EulerDiscreteScheduler.from_config(present.config, prediction_type="epsilon"))
    flow = make("FlowMatchEulerDiscrete", invert_sigmas=True).config
    check_own("UniPCMultistep", diffusers.UniPCMultistepScheduler.from_config(flow, **FLOW_SIGMAS))
