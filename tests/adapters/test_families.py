"""Every family, against exact predictions for Gaussian data, and the recorded numbers."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import amed_engine
from amed_engine.adapters import EDM, VP, ClassifierFree, ClassifierGuided, DiscreteSteps, alphas_cumprod, wrap
from amed_engine.adapters.karras import IDDPM
from amed_engine.errors import ConfigError
from amed_engine.networks import OpenAIClassifier, OpenAIUNet

SD = 0.5  # of the data, N(0, SD²) in every pixel: E[x0 | x] = x·SD²/(SD² + sigma²)


def ideal(x, sigma):
    return x * SD**2 / (SD**2 + sigma**2)


def column(t):
    return t.reshape(-1, 1, 1, 1)


def network_of(prediction):
    """(x_in, time) -> the exact prediction, from the definition of each process and its own inverse of the time."""
    acp = alphas_cumprod("cosine" if prediction == "iddpm" else "linear")

    def vp_state(x_in, time):
        """alpha, s, E[x0], E[n] of x_in = alpha·x0 + s·n at a whole step."""
        alpha2 = column(acp[time.round().long()].to(x_in))
        x, sigma = x_in / alpha2.sqrt(), (1 / alpha2 - 1).sqrt()
        x0 = ideal(x, sigma)
        return alpha2.sqrt(), (1 - alpha2).sqrt(), x0, (x - x0) / sigma

    def epsilon(x_in, time):
        return vp_state(x_in, time)[3]

    def v(x_in, time):
        alpha, s, x0, n = vp_state(x_in, time)
        return alpha * n - s * x0

    def x0(x_in, time):
        return vp_state(x_in, time)[2]

    def flow(x_in, time):
        t = column(time / 1000)
        x0 = ideal(x_in / (1 - t), t / (1 - t))
        return (x_in - x0) / t  # x_t - x0 = t (n - x0)

    def edm(x_in, time, scale=4):
        sigma = column((scale * time).exp())
        x = x_in * (sigma**2 + SD**2).sqrt()
        return (ideal(x, sigma) - SD**2 / (sigma**2 + SD**2) * x) / (sigma * SD / (sigma**2 + SD**2).sqrt())

    def vp(x_in, time):
        t = column(time / 999)
        sigma = (19.9 * t**2 / 2 + 0.1 * t).expm1().sqrt()
        x = x_in * (1 + sigma**2).sqrt()
        return (x - ideal(x, sigma)) / sigma

    def ve(x, time):
        sigma = column(2 * time.exp())
        return (ideal(x, sigma) - x) / sigma

    def score(x, sigma):
        return (ideal(x, column(sigma)) - x) / column(sigma) ** 2

    return {
        "epsilon": epsilon, "v": v, "x0": x0, "flow": flow, "edm": edm, "cm": lambda x, t: edm(x, t, 1 / 250), "vp": vp,
        "ve": ve, "iddpm": epsilon, "denoised": lambda x, sigma: ideal(x, column(sigma)),
        "consistency": lambda x, sigma: ideal(x, column(sigma)),
        "score": score,
    }[prediction]  # fmt: skip


def trained_levels(prediction):
    """Noise levels at which the network can be exact: discrete ones know whole steps only."""
    if prediction in ("epsilon", "v", "x0", "iddpm"):
        acp = alphas_cumprod("cosine" if prediction == "iddpm" else "linear")
        return (1 / acp[[3, 400, 990]] - 1).sqrt()
    return torch.tensor([0.03, 1.3, 30.0], dtype=torch.float64)


@pytest.mark.parametrize("prediction", amed_engine.adapters.PREDICTIONS)
def test_an_exact_prediction_gives_the_exact_denoiser(prediction):
    denoiser = wrap(network_of(prediction), prediction, shape=(2, 4, 4), verify=False)
    sigma = trained_levels(prediction)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64) * column((SD**2 + sigma**2).sqrt())
    torch.testing.assert_close(denoiser(x, sigma).x0, ideal(x, column(sigma)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["flow", "edm", "vp", "ve"])
def test_sampling_does_not_depend_on_what_the_network_predicts(prediction):
    latents = torch.randn(2, 2, 4, 4, dtype=torch.float64)

    def run(model, **facts):
        sampler = amed_engine.Sampler(model, nfe=5, dtype=torch.float64, sigma_min=0.02, sigma_max=40.0, **facts)
        return sampler.run(latents).images

    reference = run(lambda x, sigma: ideal(x, column(sigma)), shape=(2, 4, 4))
    got = run(Doubled(wrap(network_of(prediction), prediction, shape=(2, 4, 4))))
    torch.testing.assert_close(got, reference, rtol=0, atol=1e-6)


class Doubled(torch.nn.Module):
    """In float64: a Sampler hands networks float32 unless their parameters are float64."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.anchor = denoiser, torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.sample_shape = denoiser.sample_shape

    def forward(self, x, sigma):
        return self.denoiser(x, sigma)


# ---- noise levels and steps


@given(st.sampled_from(["linear", "scaled_linear", "cosine"]), st.floats(-0.8, 1050))
def test_sigma_and_time_are_inverse_also_beyond_the_trained_levels(betas, time):
    family = DiscreteSteps("epsilon", alphas_cumprod(betas))
    t = torch.tensor([time], dtype=torch.float64)
    torch.testing.assert_close(family.time(family.sigma(t)), t, rtol=1e-6, atol=1e-6)


def test_whole_steps_are_the_trained_levels():
    acp = alphas_cumprod("scaled_linear")
    family = DiscreteSteps("v", acp)
    steps = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(family.sigma(steps), ((1 - acp) / acp).sqrt())
    torch.testing.assert_close(family.time(((1 - acp) / acp).sqrt()), steps, rtol=0, atol=1e-8)
    assert family.sigma_max == pytest.approx(14.6146, abs=1e-4)


def test_iddpm_levels_are_the_cosine_schedule():
    """Two derivations of Nichol & Dhariwal's schedule, one from its betas and one from EDM's recursion."""
    discrete, iddpm = DiscreteSteps("epsilon", alphas_cumprod("cosine")), IDDPM()
    steps = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(discrete.sigma(steps), iddpm.levels.flip(0)[1:].double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(iddpm(iddpm.levels[:1000]).time, 999 - torch.arange(1000.0))


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_betas_are_those_of_diffusers(betas):
    diffusers = pytest.importorskip("diffusers")
    ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}[betas]
    name = "squaredcos_cap_v2" if betas == "cosine" else betas
    scheduler = diffusers.DDPMScheduler(beta_schedule=name, beta_start=ends[0], beta_end=ends[1])
    torch.testing.assert_close(alphas_cumprod(betas).float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-8)


def test_the_table_keeps_its_precision_and_follows_the_device():
    family = DiscreteSteps("epsilon", alphas_cumprod("linear"))
    before = family.log_alpha.clone()
    assert torch.equal(family.half().log_alpha, before)
    assert family.to("meta").log_alpha.device.type == "meta"


def test_vp_time_is_right_where_sigma_is_small():
    sigma = torch.tensor([1e-3])
    t = VP()(sigma).time.double() / 999
    torch.testing.assert_close((19.9 * t**2 / 2 + 0.1 * t).expm1().sqrt(), sigma.double(), rtol=1e-6, atol=0)


def test_families_take_their_options():
    denoiser = wrap(lambda x, t: x, EDM(sigma_data=1.0))
    assert denoiser(torch.ones(1, 1, 2, 2), torch.ones(1)).x0[0, 0, 0, 0] == pytest.approx(0.5 + 0.5)
    with pytest.raises(ConfigError, match="betas must be one of"):
        alphas_cumprod("quadratic")
    with pytest.raises(ConfigError, match="grow"):
        alphas_cumprod("linear", start=0.5, end=0.1)
    torch.testing.assert_close(alphas_cumprod("linear", 3, 0.1, 0.1), 0.9 ** torch.arange(1.0, 4.0).double())


# ---- recorded numbers


def recorded(goldens_dir, name):
    with safe_open(goldens_dir / "networks" / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def weights_of(golden, prefix):
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def test_recorded_consistency_model_is_reproduced(goldens_dir):
    config, golden = recorded(goldens_dir, "openai_cm_uncond")
    network = OpenAIUNet(**config)
    network.load_state_dict(weights_of(golden, "weights/"))
    with torch.no_grad():
        denoised = wrap(network.eval(), "cm")(golden["x"], golden["sigma"]).x0
    torch.testing.assert_close(denoised, golden["denoised"], rtol=1e-6, atol=1e-5)


def test_recorded_classifier_guidance_is_reproduced(goldens_dir):
    config, golden = recorded(goldens_dir, "openai_adm_classifier_guided")
    network, classifier = OpenAIUNet(**config["unet"]).eval(), OpenAIClassifier(**config["classifier"]).eval()
    network.load_state_dict(weights_of(golden, "weights/"))
    classifier.load_state_dict(weights_of(golden, "classifier_weights/"))
    guided = ClassifierGuided(wrap(network, "vp"), classifier, config["guidance_rate"])
    with torch.no_grad():
        denoised = guided(golden["cg_x"], golden["sigma"], golden["class_index"]).x0
    # D = x - sigma·eps: the float32 rounding of eps counts sigma (at most 40) times.
    torch.testing.assert_close(denoised, golden["denoised_guided"], rtol=0, atol=40 * 5e-6)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("bound", [True, False])
def test_recorded_latent_guidance_is_reproduced_beyond_the_trained_levels(goldens_dir, batched, bound):
    config, golden = recorded(goldens_dir, "latent_cfg")
    prompts, none = golden["condition"][:, None], golden["unconditional_condition"][:1, None]

    def noise(x_in, t, c):
        return torch.tanh(0.3 * x_in + column(torch.sin(0.01 * t)) + column(c))

    denoiser = wrap(
        noise,
        "epsilon",
        betas=golden["alphas_cumprod"],
        shape=(4, 8, 8),
        conditions={"c": prompts},
        null_conditions={"c": none},
    )
    torch.testing.assert_close(
        denoiser.family.time(golden["sigma"]), golden["timesteps"].double(), rtol=1e-6, atol=1e-4
    )
    guided = ClassifierFree(denoiser, config["guidance_rate"], batched=batched)
    condition = {"class_labels": torch.arange(3)} if bound else {"c": prompts}
    torch.testing.assert_close(
        guided(golden["x"], golden["sigma"], **condition).x0, golden["denoised"], rtol=1e-5, atol=1e-5
    )
    low, high = config["sigma_min"], config["sigma_max"]
    assert (denoiser.sigma_min, denoiser.sigma_max) == pytest.approx((low, high), rel=1e-6)
    assert denoiser.family.time(torch.tensor([high * 1.5])) > 999
