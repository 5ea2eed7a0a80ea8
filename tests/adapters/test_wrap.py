"""`wrap`: what it infers, what it says, and what it refuses before anything is sampled."""

import pytest
import torch
from torch import nn

import amed_engine
from amed_engine.adapters import wrap
from amed_engine.errors import ConfigError


class Scheduler:
    """As much of a diffusers scheduler as is read."""

    def __init__(self, **config):
        self.config, self.alphas_cumprod = config, (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)


class FlowMatchSomething(Scheduler):
    pass


class TextNetwork(nn.Module):
    """Needs prompts (B, L, 3)."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 1)

    def forward(self, x, t, prompt):
        return x * 0.1 + self.mix(prompt).mean(dim=1)[:, :, None, None]


PROMPTS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
NULL = torch.zeros(1, 5, 3)
X, SIGMA = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0])


# ---- what it infers


def test_a_wrapped_network_just_samples(make_unet):
    result = amed_engine.Sampler(amed_engine.wrap(make_unet(), prediction="epsilon")).run(3)
    assert result.images.shape == (3, 1, 8, 8)
    assert result.nfe == 5
    assert result.images.isfinite().all()


def test_what_was_inferred_is_said(make_unet):
    text = repr(wrap(make_unet(2, 4, num_classes=6), "epsilon"))
    for part in (
        "MiddleUNet",
        "linear, assumed",
        "(2, 8, 8), learned variances cut",
        "classes     6\n",
        "middle_block, found",
        "float32",
    ):
        assert part in text


def test_learned_variances_are_cut_off(make_unet):
    network = make_unet(1, 2)
    denoised = wrap(network, "x0")(X, SIGMA).x0
    c = wrap(network, "x0").family(SIGMA)
    torch.testing.assert_close(denoised, network(X * c.scale.reshape(-1, 1, 1, 1), c.time)[:, :1])


def test_the_scheduler_tells_prediction_and_betas(make_unet):
    for told, name in (("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "x0")):
        denoiser = wrap(make_unet(), scheduler=Scheduler(prediction_type=told))
        assert denoiser.family.name == name
        assert "from the scheduler" in denoiser.explain()
    assert wrap(make_unet(), scheduler=FlowMatchSomething()).family.name == "flow"


def test_a_scheduler_with_zero_terminal_snr_is_usable(make_unet):
    scheduler = Scheduler(prediction_type="v_prediction")
    scheduler.alphas_cumprod[-1] = 0
    assert wrap(make_unet(), scheduler=scheduler).sigma_max == pytest.approx(4096, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inside_full_precision_outside(make_unet, dtype):
    full = wrap(make_unet(), "epsilon")(X, SIGMA)
    low = wrap(make_unet().to(dtype), "epsilon")(X, SIGMA)
    assert low.x0.dtype == low.features.dtype == torch.float32
    torch.testing.assert_close(low.x0, full.x0, rtol=0, atol=0.05)
    # The state is not rounded: x passes through skip in full precision.
    shifted = wrap(make_unet().to(dtype), "epsilon")(X + 1e-5, SIGMA).x0
    assert (shifted - low.x0).median().item() == pytest.approx(1e-5, rel=0.02)


def test_gradients_reach_the_input(make_unet):
    x = X.clone().requires_grad_()
    wrap(make_unet(), "epsilon")(x, SIGMA).x0.sum().backward()
    assert x.grad.abs().sum() > 0


# ---- conditions


@pytest.fixture
def text():
    torch.manual_seed(0)
    return TextNetwork().requires_grad_(False)


def test_class_labels_choose_bound_conditions(text):
    bound = wrap(text, "epsilon", shape=(1, 8, 8), conditions={"prompt": PROMPTS}, null_conditions={"prompt": NULL})
    named = wrap(text, "epsilon", shape=(1, 8, 8), conditions=["prompt"])
    chosen = torch.tensor([1, 0])
    torch.testing.assert_close(bound(X, SIGMA, chosen).x0, named(X, SIGMA, prompt=PROMPTS[chosen]).x0)
    torch.testing.assert_close(bound(X, SIGMA, torch.zeros(2, 2)).x0, named(X, SIGMA, prompt=NULL).x0)
    images = amed_engine.Sampler(bound).run([1, 1], class_labels=[0, 1], guidance_scale=2.0).images
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_one_bound_condition_needs_no_labels(text):
    one = wrap(text, "epsilon", shape=(1, 8, 8), conditions={"prompt": PROMPTS[:1]})
    named = wrap(text, "epsilon", conditions=["prompt"])
    torch.testing.assert_close(one(X, SIGMA).x0, named(X, SIGMA, prompt=PROMPTS[:1]).x0)


def test_samples_keep_their_prompt_however_the_batch_is_cut(text):
    """Parallel points and pieces of a batch must not shift prompts against samples."""
    bound = wrap(text, "epsilon", shape=(1, 8, 8), conditions={"prompt": PROMPTS}, null_conditions={"prompt": NULL})
    sampler = amed_engine.Sampler(bound)
    whole = sampler.run([1, 2, 3, 4], class_labels=[0, 1, 1, 0], guidance_scale=2.0).images
    single = [
        sampler.run([s], class_labels=[c], guidance_scale=2.0).images for s, c in ((1, 0), (2, 1), (3, 1), (4, 0))
    ]
    torch.testing.assert_close(whole, torch.cat(single), rtol=1e-5, atol=1e-5)


def test_conditions_that_are_missing_or_of_another_batch_are_refused_before_the_network_runs():
    def network(x, t, prompt):
        raise AssertionError("the network ran")

    named = wrap(network, "epsilon", shape=(1, 8, 8), conditions=["prompt"])
    with pytest.raises(ConfigError, match="network needs prompt"):
        named(X, SIGMA)
    with pytest.raises(ConfigError, match="3 rows for a batch of 2"):
        named(X, SIGMA, prompt=torch.zeros(3, 5, 3))
    with pytest.raises(ConfigError, match="conditions hold text"):
        named(X, SIGMA, prompt=PROMPTS, text=PROMPTS)
    with pytest.raises(ConfigError, match="bind them with"):
        amed_engine.Sampler(named)
    bound = wrap(network, "epsilon", shape=(1, 8, 8), conditions={"prompt": PROMPTS})
    with pytest.raises(ConfigError, match="class_labels are missing"):
        bound(X, SIGMA)
    with pytest.raises(ConfigError, match="class_labels has 3 rows for a batch of 2"):
        bound(X, SIGMA, torch.tensor([0, 1, 0]))
    with pytest.raises(ConfigError, match="not both"):
        bound(X, SIGMA, torch.tensor([0, 1]), prompt=PROMPTS)


@pytest.mark.parametrize(
    ("conditions", "null", "message"),
    [
        ({"a": PROMPTS, "b": PROMPTS[:1]}, None, "same number of rows"),
        ({"a": torch.zeros(3)}, None, "row per prompt"),
        ({"a": PROMPTS}, {"a": PROMPTS}, r"must have shape \(1, 5, 3\)"),
        ({"a": PROMPTS}, {"b": NULL}, "null_conditions lack a"),
        (None, {"a": NULL}, "stand beside conditions"),
    ],
)
def test_tables_that_do_not_fit_are_refused(text, conditions, null, message):
    with pytest.raises(ConfigError, match=message):
        wrap(text, "epsilon", conditions=conditions, null_conditions=null)


# ---- wrong pairings


def test_a_noise_predicting_network_wrapped_as_v_is_caught():
    def noise(x, t):
        return 0.99 * x

    with pytest.raises(ConfigError, match="it predicts the noise"):
        wrap(noise, "v", shape=(1, 8, 8))
    assert wrap(noise, "v", shape=(1, 8, 8), verify=False).family.name == "v"
    assert wrap(lambda x, t: -0.3 * torch.ones_like(x), "v", shape=(1, 8, 8)).family.name == "v"


def test_a_scheduler_that_says_otherwise_is_an_error(make_unet):
    with pytest.raises(ConfigError, match="'v' was asked for, but the scheduler says 'epsilon'"):
        wrap(make_unet(), "v", scheduler=Scheduler(prediction_type="epsilon"))
    with pytest.raises(ConfigError, match="prediction_type='score'"):
        wrap(make_unet(), scheduler=Scheduler(prediction_type="score"))
    with pytest.raises(ConfigError, match="must be a diffusers scheduler"):
        wrap(make_unet(), scheduler="ddim")


def test_betas_that_contradict_the_scheduler_are_an_error(make_unet):
    scheduler = Scheduler(prediction_type="epsilon")
    for betas in ("scaled_linear", "cosine", scheduler.alphas_cumprod[:500], scheduler.alphas_cumprod**1.01):
        with pytest.raises(
            ConfigError, match=r"betas contradict the scheduler: .* Scheduler has 1000 ending at 4\.04e-05"
        ):
            wrap(make_unet(), scheduler=scheduler, betas=betas)
    for betas in ("linear", scheduler.alphas_cumprod):
        assert wrap(make_unet(), scheduler=scheduler, betas=betas).family.steps == 1000
    scheduler.alphas_cumprod = None
    assert "cosine, given" in wrap(make_unet(), scheduler=scheduler, betas="cosine").explain()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "prediction is not known"),
        ({"prediction": "noise"}, "must be one of epsilon, v, x0"),
        ({"prediction": "flow", "betas": "linear"}, "betas are for"),
        ({"prediction": "epsilon", "betas": "quadratic"}, "betas must be one of"),
        ({"prediction": "epsilon", "betas": torch.tensor([0.1, 0.9])}, "must decrease"),
        ({"prediction": "epsilon", "shape": (4, 8, 8)}, "takes 1 channels, got shape"),
        ({"prediction": "epsilon", "null_class": 3}, "without classes"),
    ],
)
def test_arguments_that_cannot_work_are_refused(make_unet, options, message):
    with pytest.raises(ConfigError, match=message):
        wrap(make_unet(), **options)


def test_models_that_cannot_work_are_refused(make_unet, tiny_model):
    with pytest.raises(ConfigError, match="takes 4 channels and predicts 3"):
        wrap(make_unet(4, 3), "epsilon")
    with pytest.raises(ConfigError, match="a denoiser already"):
        wrap(tiny_model, "epsilon")
    with pytest.raises(ConfigError, match="returns already"):
        wrap(wrap(make_unet(), "epsilon"), "epsilon")
    with pytest.raises(ConfigError, match="must be a network"):
        wrap("unet", "epsilon")
    with pytest.raises(ConfigError, match="has 4 classes, got label_dim=5"):
        wrap(make_unet(num_classes=4), "epsilon", label_dim=5)


def test_inputs_that_cannot_work_are_refused(make_unet):
    denoiser = wrap(make_unet(), "epsilon")
    with pytest.raises(ConfigError, match=r"must have shape \(B, 1, 8, 8\), got \(2, 4, 8, 8\)"):
        denoiser(torch.zeros(2, 4, 8, 8), SIGMA)
    with pytest.raises(ConfigError, match="sigma has 3 rows"):
        denoiser(X, torch.ones(3))
    with pytest.raises(ConfigError, match="no classes"):
        denoiser(X, SIGMA, torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="predicts 3 channels for samples of 1"):
        wrap(lambda x, t: x.repeat(1, 3, 1, 1), "epsilon")(X, SIGMA)


def test_a_samplers_shape_must_have_the_networks_channels(make_unet, tiny_model):
    for model in (wrap(make_unet(), "epsilon"), tiny_model):
        with pytest.raises(ConfigError, match=r"takes 1 channels, got shape=\(4, 8, 8\)"):
            amed_engine.Sampler(model, shape=(4, 8, 8))


def test_a_predictor_of_another_network_is_refused(make_unet, tiny_model):
    """By its weights, and (verify=False) by the size of its bottleneck."""
    predictor = amed_engine.distill(tiny_model, nfe=3, total_kimg=0.008, batch=8, progress=False)
    denoiser = wrap(make_unet(), "flow", bottleneck="first")
    with pytest.raises(ConfigError, match="another model"):
        amed_engine.Sampler(denoiser, predictor)
    other = wrap(make_unet(), "flow", bottleneck="last")
    with pytest.raises(ConfigError, match="bottleneck"):
        amed_engine.Sampler(other, predictor, verify=False).run(2)


def test_a_shape_that_is_not_square_reaches_the_sampler():
    denoiser = wrap(lambda x, t: 0.1 * x, "epsilon", shape=(2, 4, 6))
    assert denoiser.img_resolution is None
    assert amed_engine.Sampler(denoiser).run(2).images.shape == (2, 2, 4, 6)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda x: {"mean": x, "std": x}, "dict of 'mean': Tensor, 'std': Tensor; .*takes it out of the answer"),
        (lambda x: {}, "dict of nothing"),
        (lambda x: None, "got NoneType"),
        (lambda x: x.long(), "got torch.int64"),
        (lambda x: x + 0j, "got torch.complex64"),
        (lambda x: x.mean((1, 2, 3)), r"shape \(2,\) for samples \(2, 3, 8, 8\)"),
        (lambda x: x[:1], r"shape \(1, 3, 8, 8\) for"),
        (lambda x: x.mean((2, 3), keepdim=True), r"shape \(2, 3, 1, 1\) for"),
    ],
)
def test_predictions_that_are_no_tensor_like_the_samples_are_refused(answer, told):
    denoiser = wrap(lambda x, t: answer(x), "epsilon", shape=(3, 8, 8), verify=False)
    with pytest.raises(ConfigError, match=told):
        denoiser(torch.ones(2, 3, 8, 8), torch.ones(2))
    with pytest.raises(ConfigError, match=told.replace(r"\(2", r"\(8")):
        wrap(lambda x, t: answer(x), "epsilon", shape=(3, 8, 8))
