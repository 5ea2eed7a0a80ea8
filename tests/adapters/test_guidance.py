"""Guidance and thresholding, against the formulas written out."""

import pytest
import torch
from torch import Tensor

import amed_engine
from amed_engine.adapters import ClassifierFree, ClassifierGuided, Thresholded, wrap
from amed_engine.errors import ConfigError

SIGMA = torch.tensor([0.1, 2.0, 9.0])
LABELS = torch.tensor([0, 2, 1])
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * SIGMA.reshape(-1, 1, 1, 1)


def column(t):
    return t.reshape(-1, 1, 1, 1)


@pytest.fixture
def denoiser(make_unet):
    """Three classes, and a fourth row for none."""
    return wrap(make_unet(num_classes=4), "epsilon", label_dim=4, null_class=3)


def by_hand(denoiser, scale):
    conditional = denoiser(X, SIGMA, LABELS).x0
    unconditional = denoiser(X, SIGMA, torch.full((3,), 3)).x0
    return unconditional + scale * (conditional - unconditional)


@pytest.mark.parametrize("batched", [True, False])
def test_classifier_free_guidance_is_its_formula(denoiser, batched):
    guided = ClassifierFree(denoiser, 3.0, batched=batched)(X, SIGMA, LABELS)
    torch.testing.assert_close(guided.x0, by_hand(denoiser, 3.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided.features, denoiser(X, SIGMA, LABELS).features)


def test_guidance_acts_in_its_interval_only(denoiser):
    guided = ClassifierFree(denoiser, 3.0, interval=(0.1, 2.0))(X, SIGMA, LABELS).x0
    plain, full = denoiser(X, SIGMA, LABELS).x0, by_hand(denoiser, 3.0)
    torch.testing.assert_close(guided, torch.stack([plain[0], full[1], plain[2]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_round_the_denoiser_is_the_samplers_own(denoiser, batched):
    own = amed_engine.Sampler(denoiser).run([1, 2, 3], class_labels=LABELS, guidance_scale=3.0).images
    wrapped = amed_engine.Sampler(ClassifierFree(denoiser, 3.0, batched=batched)).run([1, 2, 3], LABELS).images
    torch.testing.assert_close(wrapped, own, rtol=1e-4, atol=1e-4)


def test_guiding_twice_or_without_no_class_is_refused(make_unet, denoiser):
    sampler = amed_engine.Sampler(ClassifierFree(denoiser, 3.0))
    with pytest.raises(ConfigError, match="not guided already"):
        sampler.run(2, guidance_scale=2.0)
    without = wrap(make_unet(num_classes=4), "epsilon")
    with pytest.raises(ConfigError, match='knows "no class"'):
        amed_engine.Sampler(without).run(2, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="null_class"):
        ClassifierFree(without, 2.0)
    with pytest.raises(ConfigError, match="lo < hi"):
        ClassifierFree(denoiser, 2.0, interval=(2.0, 1.0))


def test_any_conditional_denoiser_can_be_guided(tiny_conditional):
    own = amed_engine.Sampler(tiny_conditional).run([1, 2], class_labels=[3, 4], guidance_scale=2.0).images
    wrapped = amed_engine.Sampler(ClassifierFree(tiny_conditional, 2.0)).run([1, 2], class_labels=[3, 4]).images
    torch.testing.assert_close(wrapped, own, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="right round what wrap returns"):
        ClassifierFree(tiny_conditional, 2.0)(X, SIGMA, prompt=X)


class LogitsOfMeans(torch.nn.Module):
    """log p(y | x) with the gradient known by hand: logits_k = k·sum(x)."""

    out_channels = 3

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.sum(dim=(1, 2, 3))[:, None] * torch.arange(3.0)


def test_classifier_guidance_moves_along_the_gradient(make_unet):
    denoiser = wrap(make_unet(), "epsilon")
    with torch.no_grad():
        guided = ClassifierGuided(denoiser, LogitsOfMeans(), 2.0, clamp=None)(X, SIGMA, LABELS)
        x_in = X / column((1 + SIGMA**2).sqrt())
        p = LogitsOfMeans()(x_in, SIGMA).softmax(dim=1)
        gradient = LABELS - p @ torch.arange(3.0)  # d log p_y / d x, the same in every pixel
        s = SIGMA / (1 + SIGMA**2).sqrt()
        expected = denoiser(X, SIGMA).x0 + column(SIGMA * s * 2.0 * gradient)
    torch.testing.assert_close(guided.x0, expected, rtol=1e-5, atol=1e-5)
    clamped = ClassifierGuided(denoiser, LogitsOfMeans(), 2.0)(X, SIGMA, LABELS).x0
    torch.testing.assert_close(clamped, expected.clamp(-1, 1), rtol=1e-5, atol=1e-5)


def test_classifier_guidance_samples_on_an_unconditional_network(make_unet):
    guided = ClassifierGuided(wrap(make_unet(), "epsilon"), LogitsOfMeans(), 0.1)
    images = amed_engine.Sampler(guided).run([5, 5], class_labels=[0, 2]).images
    assert images[1].mean() > images[0].mean()  # class 2 has the larger sum
    with pytest.raises(ConfigError, match="needs class_labels"):
        guided(X, SIGMA)


def test_classifier_and_network_must_agree_on_classes(make_unet):
    with pytest.raises(ConfigError, match="the classifier tells 3 classes, the network 4"):
        ClassifierGuided(wrap(make_unet(num_classes=4), "epsilon"), LogitsOfMeans(), 1.0)
    with pytest.raises(ConfigError, match="what wrap returns"):
        ClassifierGuided(make_unet(), LogitsOfMeans(), 1.0)


def test_thresholding_is_a_quantile_of_each_sample(denoiser):
    plain = denoiser(X, SIGMA, LABELS)
    x0, features = Thresholded(denoiser, quantile=0.9, floor=0.05)(X, SIGMA, LABELS)
    s = plain.x0.flatten(1).abs().quantile(0.9, dim=1).clamp_min(0.05)
    torch.testing.assert_close(x0, (plain.x0 / column(s)).clamp(-1, 1))
    torch.testing.assert_close(features, plain.features)
    assert amed_engine.Sampler(Thresholded(denoiser)).run(2).images.shape == (2, 1, 8, 8)


def refused(model, *inputs, message, **conditions):
    with pytest.raises(ConfigError, match=message):
        model(*inputs, **conditions)


def never(x, t, *_, **__):
    raise AssertionError("the network ran")


@pytest.mark.parametrize("batched", [True, False])
def test_conditions_that_guidance_cannot_use_are_refused_before_the_network_runs(batched):
    prompts, null = torch.randn(2, 5, 4), torch.zeros(1, 5, 4)
    bound = wrap(never, "epsilon", shape=(1, 8, 8), conditions={"prompt": prompts}, null_conditions={"prompt": null})
    guided = ClassifierFree(bound, 2.0, batched=batched)
    three = torch.randn(3, 5, 4)
    refused(guided, X, SIGMA, message="guidance needs class_labels")
    refused(guided, X, SIGMA, torch.tensor([0, 1]), message="class_labels has 2 rows for a batch of 3")
    refused(
        guided, X, SIGMA, torch.zeros(3, 5), message=r"integers \(B,\) or rows \(B, 2\), got torch.float32 of shape"
    )
    refused(guided, X, SIGMA, [0, 1, 1], message="must be a tensor of integers .* got list")
    refused(guided, X, SIGMA[:2], LABELS, message="sigma has 2 rows for a batch of 3")
    refused(guided, X, SIGMA[:, None], LABELS, message=r"sigma must have shape \(\) or \(B,\), got \(3, 1\)")
    refused(guided, X, SIGMA, prompt=prompts, message="'prompt' has 2 rows for a batch of 3")
    refused(guided, X, SIGMA, prompt=three[:, :4], message=r"rows of shape \(4, 4\), null_conditions of \(5, 4\)")
    refused(guided, X, SIGMA, text=three, message="conditions lack prompt")
    refused(guided, X, SIGMA, prompt=three, text=three, message="conditions hold text")
    refused(guided, X, SIGMA, prompt=3.0, message="must be a tensor with a row per prompt")
    refused(guided, X, SIGMA, LABELS, prompt=three, message="not both")
    refused(guided, torch.zeros(3, 4, 8, 8), SIGMA, LABELS, message=r"x must have shape \(B, 1, 8, 8\), got")


def test_labels_that_no_wrapper_can_use_are_refused_before_the_network_runs():
    classed = wrap(never, "epsilon", shape=(1, 8, 8), label_dim=3)
    for model in (classed, Thresholded(classed), ClassifierGuided(classed, never, 2.0)):
        refused(model, X, SIGMA, torch.tensor([0, 1]), message="class_labels has 2 rows for a batch of 3")
        refused(model, X, SIGMA, torch.zeros(3, 5), message=r"rows \(B, 3\), got torch.float32 of shape \(3, 5\)")
        refused(model, X, SIGMA, 3, message="must be a tensor of integers .* got int")
        refused(model, X, torch.ones(2), LABELS, message="sigma has 2 rows for a batch of 3")
        refused(model, torch.zeros(3, 4, 8, 8), SIGMA, LABELS, message="x must have shape")


def test_a_sampler_refuses_labels_before_the_network_runs(make_unet):
    network = make_unet(num_classes=3)
    network.register_forward_pre_hook(never)
    sampler = amed_engine.Sampler(wrap(network, "epsilon"))
    for labels, message in (
        ([0, 1, 2], r"2 integers or vectors \(2, 3\), got 3 integers"),
        ([0, 3], r"must be in 0 \.\. 2, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            sampler.run(2, class_labels=labels)


def test_wrappers_explain_themselves(denoiser):
    text = Thresholded(ClassifierFree(denoiser, 3.0, interval=(0.1, 2.0))).explain()
    assert "MiddleUNet" in text
    assert "ClassifierFree: scale=3, 0.1 < sigma <= 2, one doubled batch" in text
    assert "Thresholded: quantile=0.995" in text
