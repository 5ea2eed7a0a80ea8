"""The look at a network's answers: quiet on every denoiser, and a sentence for what is none."""

import logging
import math
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import amed_engine
from amed_engine.adapters import DiscreteSteps, VPScore, alphas_cumprod, look, wrap
from amed_engine.adapters.choosing import FAMILIES
from amed_engine.adapters.family import spread
from amed_engine.adapters.verify import verdict
from amed_engine.errors import ConfigError

CPU = torch.device("cpu")


def figures(denoise, shape=(1, 8, 8), high=80.0):
    return look.figures_of(look.Asked(denoise, shape, 0.002, high, CPU))


def gaussian(mean=0.25, sd=0.5):
    return lambda x, sigma: (x * sd**2 + mean * spread(sigma, x) ** 2) / (sd**2 + spread(sigma, x) ** 2)


def mixture(means, sds, weights):
    """The denoiser of Gaussians about constant images, in float64."""

    def denoise(x, sigma):
        x, sigma = x.double(), sigma.double()
        answers, logs = [], []
        for mean, sd, weight in zip(means, sds, weights, strict=True):
            variance = sd**2 + sigma**2
            answers.append(gaussian(mean, sd)(x, sigma))
            square = (x - mean).flatten(1).square().sum(1)
            logs.append(math.log(weight) - square / (2 * variance) - x[0].numel() / 2 * variance.log())
        parts = torch.stack(logs).softmax(0)
        return sum(spread(part, x) * answer for part, answer in zip(parts, answers, strict=True)).float()

    return denoise


def flow_to_data(denoise, steps=12):
    """The consistency function of a denoiser: Heun's method from x at sigma to the data."""

    def sample(x, sigma):
        levels = [sigma[0].item() * (0.01 / sigma[0].item()) ** (i / steps) for i in range(steps + 1)]
        for level, after in pairwise(levels):
            slope = (x - denoise(x, torch.full_like(sigma, level))) / level
            guess = x + (after - level) * slope
            other = (guess - denoise(guess, torch.full_like(sigma, after))) / after
            x = x + (after - level) * (slope + other) / 2
        return denoise(x, torch.full_like(sigma, levels[-1]))

    return sample


@pytest.fixture(scope="module")
def digits():
    return amed_engine.load("digits")


def network_of(denoise, family):
    """The raw network of a family that makes this denoiser, exact at its noise levels; times by bisection."""

    def network(x_in, time):
        low, high = torch.full_like(time, 1e-4, dtype=torch.float64), torch.full_like(time, 1e4, dtype=torch.float64)
        grows = family(high).time[0] > family(low).time[0]
        for _ in range(60):
            middle = (low * high).sqrt()
            below = (family(middle).time < time.double()) == grows
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        sigma = low.float()
        c = family(sigma)
        x = x_in / spread(c.scale, x_in)
        return (denoise(x, sigma) - spread(c.skip, x) * x) / spread(c.out, x)

    return network


def family_of(name):
    discrete = name in ("epsilon", "v", "x0")
    return DiscreteSteps(name, alphas_cumprod("linear")) if discrete else FAMILIES[name]()


# ---- no false alarm


SHAPES = st.sampled_from([(1,), (2,), (1, 8, 8), (3, 16, 16)])


@given(mean=st.floats(-1000, 1000), log_sd=st.floats(-2, 2), shape=SHAPES)
@example(mean=0.0, log_sd=1.0, shape=(3, 64, 64))
@example(mean=0.0, log_sd=math.log10(9), shape=(1, 8, 8))  # whose answers at sigma 80 are the noise, and nowhere else
@example(mean=0.0, log_sd=math.log10(46), shape=(1, 8, 8))  # whose answers at 80 and 80/3 are alike
def test_gaussian_data_raise_no_alarm(mean, log_sd, shape):
    assert verdict(figures(gaussian(mean, 10**log_sd), shape), "denoised") is None


@given(
    means=st.lists(st.floats(-30, 30), min_size=2, max_size=4),
    log_sds=st.lists(st.floats(-3, 0.5), min_size=4, max_size=4),
    weights=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    shape=SHAPES,
)
@example(means=[0.0, 10.0], log_sds=[0.0, -3.0, 0.0, 0.0], weights=[0.9, 0.1, 1, 1], shape=(1, 8, 8))
@example(means=[-50.0, 50.0], log_sds=[0.0, -3.0, 0.0, 0.0], weights=[0.5, 0.5, 1, 1], shape=(3, 64, 64))
def test_far_modes_raise_no_alarm(means, log_sds, weights, shape):
    count = len(means)
    denoise = mixture(means, [10**each for each in log_sds[:count]], weights[:count])
    assert verdict(figures(denoise, shape), "denoised") is None


@pytest.mark.parametrize("name", ["epsilon", "v", "x0", *FAMILIES])
def test_exact_networks_of_every_family_raise_no_alarm(caplog, name):
    if name == "consistency":
        pytest.skip("no denoiser")
    family = family_of(name)
    denoiser = wrap(network_of(gaussian(), family), name, shape=(1, 8, 8))
    assert denoiser.looked_at
    assert not caplog.records


def test_the_bundled_model_raises_no_alarm(digits):
    for label in (None, 3):
        rows = None if label is None else torch.nn.functional.one_hot(torch.tensor([label]), 10).float()

        @torch.no_grad()
        def denoise(x, sigma, rows=rows):
            return digits(x, sigma, None if rows is None else rows.expand(len(x), -1)).x0

        @torch.no_grad()
        def guided(x, sigma):
            nothing, five = (digits(x, sigma, torch.eye(10)[[5] * len(x)] * part).x0 for part in (0, 1))
            return nothing + 2 * (five - nothing)

        assert verdict(figures(denoise), "denoised") is None
        assert verdict(figures(guided), "denoised") is None


# ---- what is none


@pytest.mark.parametrize(
    ("true", "said", "told"),
    [
        ("epsilon", "x0", r"are the noise of the latents \(cosine 1\.00, size 1\.00\).*prediction=\"epsilon\""),
        ("v", "epsilon", r'keep 100% of the noise.*prediction="v" or "x0"'),
        ("x0", "epsilon", r'keep 100% of the noise.*prediction="v" or "x0"'),
        ("epsilon", "ve", r"keep .*% of the noise"),
        ("flow", "epsilon", r'run against the noise.*or prediction="flow"'),
        ("x0", "flow", r"are the noise of the latents"),
        ("edm", "flow", r"are the noise of the latents"),
        ("flow", "denoised", r"run against the noise.*amed_engine\.wrap"),
        ("ve", "vp", r"keep 100% of the noise"),
        ("vp", "v", "it predicts the noise"),
    ],
)
def test_a_wrong_prediction_is_told(caplog, true, said, told):
    network = network_of(gaussian(), family_of(true))
    if said == "v":
        with pytest.raises(ConfigError, match=told):
            wrap(network, said, shape=(1, 8, 8))
        return
    denoiser = wrap(network, said, shape=(1, 8, 8))
    assert len(caplog.messages) == 1
    assert "verify=False" in caplog.text
    assert re.search(told, denoiser.notes["beware"])
    caplog.clear()
    wrap(network, said, shape=(1, 8, 8), verify=False)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("true", "said", "told"),
    [
        ("flow", "x0", 'prediction="epsilon", one that predicts the noise less the data for "flow"'),
        ("edm", "flow", 'or "score", "edm" or "denoised" of one told sigma'),
        ("score", "ve", 'a score, prediction="score"'),
        ("epsilon", "ve", 'told steps answers so: prediction="epsilon"'),
        ("epsilon", "score", 'told steps answers so: prediction="epsilon"'),
        ("epsilon", "denoised", r"a raw network answers so: amed_engine\.wrap\(network"),
        ("flow", "vp", r'prediction="epsilon" with its betas=, or "flow"'),
    ],
)
def test_the_right_prediction_is_among_those_named(true, said, told):
    assert re.search(told, wrap(network_of(gaussian(), family_of(true)), said, shape=(1, 8, 8)).notes["beware"])


def test_a_flow_network_said_to_predict_v_is_told_both_that_answer_so():
    with pytest.raises(ConfigError, match='prediction="epsilon", or "flow"'):
        wrap(network_of(gaussian(), family_of("flow")), "v", shape=(1, 8, 8))


@pytest.mark.parametrize("mean", [0.0, 0.3])
def test_a_flow_network_of_unit_data_said_to_predict_the_noise_is_told(mean):
    """Nothing runs against the noise there: it is more of it that is kept below than the data could be."""
    denoiser = wrap(network_of(gaussian(mean, 1.0), family_of("flow")), "epsilon", shape=(4, 8, 8))
    assert re.search(r"at sigma=52.5 .* as if the data were wider there.*\"flow\"", denoiser.notes["beware"])


@pytest.mark.parametrize("sd", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("name", ["epsilon", "v", "x0"])
def test_wide_data_of_discrete_steps_raise_no_alarm(caplog, name, sd):
    wrap(network_of(gaussian(0.0, sd), family_of(name)), name, shape=(4, 8, 8))
    assert not caplog.messages


def test_betas_of_more_noise_than_it_was_trained_with_are_told(caplog, digits):
    @torch.no_grad()
    def denoise(x, sigma):
        return digits(x, sigma).x0

    network = network_of(denoise, DiscreteSteps("epsilon", alphas_cumprod("cosine")))
    wrap(network, "epsilon", betas="cosine", shape=(1, 8, 8))
    assert not caplog.messages
    wrap(network, "epsilon", betas="linear", shape=(1, 8, 8))
    assert re.search("at sigma=3 its answers run against the noise.*other betas than it was trained with", caplog.text)


def test_a_consistency_function_is_told_from_a_denoiser(digits):
    @torch.no_grad()
    def denoise(x, sigma):
        return digits(x, sigma).x0

    for true in (gaussian(), gaussian(0.0, 5.0), denoise):
        told = verdict(figures(flow_to_data(true)), "denoised")
        assert told.kind == "consistency"
        assert "vary from latent to latent by" in told.text


def test_a_consistency_function_of_unit_data_may_answer_with_the_noise(caplog):
    sample = flow_to_data(gaussian(0.0, 1.0))
    for solver in ("consistency", "euler"):
        amed_engine.Sampler(wrap(sample, "consistency", shape=(1, 8, 8)), solver="consistency", nfe=1)
        amed_engine.Sampler(wrap(network_of(sample, family_of("cm")), "cm", shape=(1, 8, 8)), solver=solver, nfe=2)
        assert any("consistency function" in text for text in caplog.messages) == (solver == "euler")
    assert 'wrap(network, "consistency")' in verdict(figures(sample), "denoised").text


class Generator(nn.Module):
    """The consistency function of N(0, 0.5²), as a network of the consistency models."""

    def forward(self, x_in, time):
        sigma = spread((time / 250).exp(), x_in)
        x = x_in * (sigma**2 + 0.25).sqrt()
        return (x / (1 + 4 * sigma**2).sqrt() - 0.25 / (sigma**2 + 0.25) * x) / (0.5 * sigma / (sigma**2 + 0.25).sqrt())


def test_a_consistency_function_taken_for_a_teacher_is_told_where_an_ode_is_solved(caplog):
    denoiser = wrap(Generator(), "cm", shape=(1, 8, 8))
    assert not caplog.messages
    amed_engine.Sampler(denoiser, solver="euler", nfe=2)
    assert any("consistency function" in text for text in caplog.messages)


class Told(nn.Module):
    """f(x, sigma; number) of N(number, 0.5²): its consistency function, good near sigma_max alone, or else its denoiser."""

    label_dim, label_kind, sample_shape, sigma_min, sigma_max = 1, "float", (1, 8, 8), 0.002, 80.0

    def __init__(self, generates=True):
        super().__init__()
        self.generates, self.weight = generates, nn.Parameter(torch.ones(1))

    def forward(self, x, sigma, number):
        number, sigma = spread(number.flatten(), x), spread(sigma, x)
        away, variance = (x - number) * self.weight, 0.25 + sigma**2
        drawn = away * 0.5 / variance.sqrt() + away.roll(1, 3) * 0.25 / (variance.sqrt() * (1 + sigma / 20))
        return number + (drawn if self.generates else away * 0.25 / variance)


def test_a_network_that_is_told_numbers_is_looked_at_too(caplog):
    amed_engine.Sampler(Told(generates=False), solver="euler", nfe=2)
    wrap(Told(generates=False), "denoised", shape=(1, 8, 8))
    assert not caplog.messages
    amed_engine.Sampler(Told(), solver="euler", nfe=2)
    assert re.search(
        r"Told taken as a denoiser: told 0\.5, .* a consistency function.*--solver consistency", caplog.text
    )
    assert "a consistency function" in wrap(Told(), "denoised", shape=(1, 8, 8)).notes["beware"]
    caplog.clear()
    wrap(Told(), "consistency", shape=(1, 8, 8))
    assert not caplog.messages


def test_numbers_that_nobody_gave_make_no_error():
    def network(x, time, number):
        return x / (number.view(-1, 1, 1, 1) - 0.5)

    assert wrap(network, "epsilon", labels="float", shape=(1, 8, 8)).looked_at


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_onnx_file_of_unknown_make_is_looked_at(caplog, tmp_path):
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name)
    x, ones = torch.zeros(2, 1, 8, 8), torch.ones(2)
    axes = {name: {0: "batch"} for name in ("noisy", "sigma", "number", "out")}
    names = {"input_names": ["noisy", "sigma", "number"], "output_names": ["out"]}
    torch.onnx.export(Told(), (x, ones, ones), tmp_path / "told.onnx", dynamo=False, dynamic_axes=axes, **names)
    amed_engine.Sampler(tmp_path / "told.onnx", solver="euler", nfe=2)
    assert "OnnxModel taken as a denoiser: told 0.5" in caplog.text


def test_a_generator_of_one_noise_level_is_told_from_modes_and_errors():
    """Figures of networks that others trained: heights, told 0.5, and galaxies; and of two far modes."""
    level = look.Level(80.0, 0.011, 0.035, 0.318)
    below, middle = look.Level(26.7, 0.0119, 0.073, 0.163), look.Level(0.279, 0.107, 0.97, 0.109)
    heights = look.Figures(level, below, middle, growth=0.10, change=0.70, share=0.068, size=0.42, modes=20.0)
    assert look.stays(heights)
    assert not look.stays(heights._replace(modes=2.0))
    assert not look.stays(heights._replace(growth=-1.04, share=0.012, change=1.36))
    assert not look.stays(heights._replace(change=8.2))


# ---- raw networks given to Sampler


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.rows = nn.Parameter(torch.ones(1)), 0

    def forward(self, x, sigma):
        self.rows += len(x)
        return self.weight * x * spread(sigma, x) / (spread(sigma, x) ** 2 + 0.25)


def test_a_raw_network_given_to_a_sampler_is_told_once(caplog):
    network = Noise().train()
    state = torch.random.get_rng_state()
    amed_engine.Sampler(network, solver="euler", nfe=2, shape=(1, 8, 8), verify=False)
    assert network.rows == 0
    for _ in range(2):
        amed_engine.Sampler(network, solver="euler", nfe=2, shape=(1, 8, 8))
    assert network.rows == 16
    told = [text for text in caplog.messages if "Noise taken as a denoiser" in text]
    assert len(told) == 1
    assert 'amed_engine.wrap(network, prediction="epsilon")' in told[0]
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_published_raw_network_is_refused_by_name():
    network = amed_engine.networks.SongUNet(
        8, 1, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )
    with pytest.raises(ConfigError, match="SongUNet is a raw network, no denoiser"):
        amed_engine.Sampler(network, shape=(1, 8, 8))


def test_a_shape_that_the_sampler_knows_first_is_looked_at_then(caplog):
    denoiser = wrap(lambda x, t: 0 * x, "epsilon")
    assert not caplog.messages
    amed_engine.Sampler(denoiser, solver="euler", nfe=2, shape=(1, 8, 8))
    assert "keep 100% of the noise" in caplog.text


def test_a_shape_that_the_first_latents_tell_is_looked_at_then(caplog):
    network, latents = Noise(), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler = amed_engine.Sampler(network, solver="euler", nfe=2)
    assert network.rows == 0
    sampler.run(latents)
    assert network.rows == 16 + 4
    assert "Noise taken as a denoiser" in caplog.text
    sampler.run(latents)
    assert network.rows == 16 + 8
    assert len([text for text in caplog.messages if "taken as a denoiser" in text]) == 1


# ---- what cannot be sampled, and what is left alone


def test_answers_that_are_not_finite_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="100% of what the network answers to noise at sigma=157"):
            wrap(lambda x, t, bad=bad: x * 0 + bad, "epsilon", shape=(1, 8, 8))


def test_one_number_that_is_not_finite_is_counted():
    def network(x, t):
        x = x.clone()
        x[3, 0, 0, 0] = math.inf
        return x

    with pytest.raises(ConfigError, match="1 of 512 numbers of what the network answers"):
        wrap(network, "epsilon", shape=(1, 8, 8))


def test_a_network_of_one_batch_is_left_to_its_sampler(caplog):
    def network(x, t):
        return x.reshape(2, 1, 8, 8)

    with caplog.at_level(logging.DEBUG, "amed_engine"):
        wrap(network, "epsilon", shape=(1, 8, 8))
    assert "no look at function" in caplog.text


def test_modes_hooks_and_random_numbers_are_left_as_they_were(make_unet):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, x, t):
            assert not self.training
            return self.layer(x) + 0 * torch.rand(())

    network = Dropping().train()
    state = torch.random.get_rng_state()
    wrap(network, "epsilon", shape=(1, 8, 8))
    assert network.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_vp_score_network_of_constant_beta():
    """y = exp(-t/2) x0 + sqrt(1 - exp(-t)) n: the process of beta 1."""

    def score(y, t):
        sigma, t = spread(t.expm1().sqrt(), y), spread(t, y)
        x = y * (t / 2).exp()
        return (gaussian()(x, sigma.flatten()) - x) / sigma**2 * (t / 2).exp()

    denoiser = wrap(score, VPScore(beta_d=0, beta_min=1, horizon=10), shape=(1, 8, 8))
    x, sigma = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 2.0, 100.0])
    torch.testing.assert_close(denoiser(x, sigma).x0, gaussian()(x, sigma), rtol=1e-4, atol=1e-4)
    assert denoiser.sigma_max == pytest.approx(math.sqrt(math.expm1(10)))
