"""`sample_amed`, called as k-diffusion calls its samplers, draws what `Sampler.run` draws."""

import inspect
import logging

import pytest
import torch
from mean_answers import make_mean
from torch import nn

from amed_engine import ConfigError, Midpoint, Sampler, make_plan, make_schedule, sample, save_predictor
from amed_engine.integrations.common import constants
from amed_engine.integrations.k_diffusion import sample_amed
from amed_engine.sampling.denoiser import dynamic_thresholding, mean_of_labels
from amed_engine.solvers import make_solver


class Wrapped(nn.Module):
    """A denoiser in k-diffusion's shape: (x, sigma (B,), **extra_args) -> D alone, the network inside `inner_model`."""

    def __init__(self, inner_model):
        super().__init__()
        self.inner_model, self.calls = inner_model, []

    def forward(self, input, sigma, **kwargs):
        self.calls.append((sigma, kwargs))
        return self.inner_model(input, sigma, **kwargs).x0


@pytest.fixture
def wrapped(tiny_model):
    return Wrapped(tiny_model)


def last_encoder(model) -> str:
    return "inner_model.model.enc." + list(model.inner_model.model.enc)[-1]


def draw(wrapped, predictor, latents, **options):
    sigmas = predictor.plan.levels.float()
    zero = torch.cat([sigmas, sigmas.new_zeros([1])])
    options = {"disable": True, "bottleneck": last_encoder(wrapped), "afs": predictor.plan.afs} | options
    return sample_amed(wrapped, latents * sigmas[0], zero, predictor=predictor, **options)


def test_the_signature_is_that_of_a_k_diffusion_sampler():
    names = list(inspect.signature(sample_amed).parameters)
    assert names[:6] == ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    parameters = inspect.signature(sample_amed).parameters
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in names[6:])


def test_it_draws_what_the_engine_draws(wrapped, predictor, latents, expected):
    assert (draw(wrapped, predictor, latents) - expected).abs().max() < 1e-5


def test_the_bottleneck_matters_here(wrapped, predictor, latents, expected):
    assert (draw(wrapped, predictor, latents, bottleneck=None) - expected).abs().max() > 1e-3


def test_the_second_evaluation_of_a_step_has_a_level_per_sample(wrapped, predictor, latents):
    draw(wrapped, predictor, latents)
    sigmas = [sigma for sigma, _ in wrapped.calls]
    assert all(sigma.shape == (len(latents),) for sigma in sigmas)
    assert len(sigmas) == predictor.plan.nfe
    assert sigmas[-1].std() > 0
    assert sigmas[-2].std() == 0


def test_a_module_or_a_function_serves_as_bottleneck_too(wrapped, predictor, latents, expected):
    block = wrapped.get_submodule(last_encoder(wrapped))
    assert (draw(wrapped, predictor, latents, bottleneck=block) - expected).abs().max() < 1e-5
    seen = []
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert (draw(wrapped, predictor, latents, bottleneck=lambda: seen[-1]) - expected).abs().max() < 1e-5
    handle.remove()


def test_nothing_stays_on_the_model(wrapped, predictor, latents):
    block = wrapped.get_submodule(last_encoder(wrapped))

    def broken(info):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        draw(wrapped, predictor, latents, callback=broken)
    assert not block._forward_hooks


def test_the_callback_sees_each_step_at_its_start(wrapped, predictor, latents):
    infos = []
    draw(wrapped, predictor, latents, callback=infos.append)
    levels = predictor.plan.levels
    assert [set(info) for info in infos] == [{"x", "i", "sigma", "sigma_hat", "denoised"}] * predictor.plan.intervals
    assert [info["i"] for info in infos] == list(range(predictor.plan.intervals))
    for info, level in zip(infos, levels, strict=False):
        assert float(info["sigma"]) == float(info["sigma_hat"]) == pytest.approx(float(level))
        at = info["sigma"].expand(len(latents))
        direct = wrapped(info["x"], at)
        if predictor.plan.afs and info["i"] == 0:
            direct = info["x"] - level.float() * info["x"] / (1 + level.float() ** 2).sqrt()
        # An image of size sigma, in float32.
        torch.testing.assert_close(info["denoised"], direct, rtol=0, atol=1e-6 * max(1, float(level)))
    assert torch.equal(infos[0]["x"], latents * levels[0].float())


def test_extra_arguments_reach_the_model(tiny_conditional, predictor, latents):
    wrapped = Wrapped(tiny_conditional)
    labels = torch.eye(10)[[3, 1, 4]]
    drawn = draw(wrapped, predictor, latents, extra_args={"class_labels": labels})
    expected = Sampler(tiny_conditional, predictor).run(latents, class_labels=[3, 1, 4]).images
    assert (drawn - expected).abs().max() < 1e-5


def test_constants_need_no_bottleneck(gaussian_denoiser, latents):
    sigmas = make_schedule("polynomial", 4, 0.002, 80.0)
    mids = [Midpoint(0.4, 1.02, 0.99), Midpoint(0.6), Midpoint(0.5, 0.98)]
    drawn = sample_amed(gaussian_denoiser, latents * 80, sigmas.float(), disable=True, predictor=mids)
    expected = sample(gaussian_denoiser, latents * 80, sigmas, make_solver("amed"), mids)
    assert (drawn - expected).abs().max() < 1e-5


def test_constants_of_a_predictor_are_its_word_without_features(gaussian_denoiser, predictor, latents):
    levels, afs = predictor.plan.levels, predictor.plan.afs
    mids, latents = constants(predictor, levels), latents.double()
    fixed = sample_amed(gaussian_denoiser, latents * 80, levels, disable=True, predictor=mids, afs=afs)
    learned = sample(gaussian_denoiser, latents * 80, levels, make_solver("amed"), predictor.double(), afs=afs)
    assert (fixed - learned).abs().max() < 1e-12


def test_a_predictor_file_and_a_plan_of_another_solver(wrapped, latents, tmp_path, predictor):
    predictor.plan = make_plan(6, solver="ipndm", options={"max_order": 2}, midpoint=True)
    save_predictor(predictor, tmp_path / "p.safetensors")
    sigmas = predictor.plan.levels
    drawn = sample_amed(
        wrapped,
        latents * sigmas[0].float(),
        sigmas,
        disable=True,
        predictor=tmp_path / "p.safetensors",
        bottleneck=last_encoder(wrapped),
    )
    expected = Sampler(wrapped.inner_model, predictor).run(latents).images
    assert (drawn - expected).abs().max() < 1e-5


def test_a_trailing_zero_is_dropped_without_a_word(wrapped, predictor, latents, caplog):
    with caplog.at_level(logging.WARNING):
        assert draw(wrapped, predictor, latents).isfinite().all()
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bottleneck": "inner_model.nowhere"}, "no submodule 'inner_model.nowhere'"),
        ({"bottleneck": 3}, "module's name, a module or a function, got int"),
        ({"bottleneck": lambda: torch.zeros(6, 8, 4, 4)}, "6 rows for 3 samples"),
        ({"bottleneck": nn.Identity()}, "not read in this evaluation"),
        ({"predictor": 0.5}, "one of this package, a path to one, or one Midpoint"),
    ],
)
def test_what_cannot_work_is_refused(wrapped, predictor, latents, options, match):
    sigmas = predictor.plan.levels
    options = {"predictor": predictor, "afs": predictor.plan.afs, "disable": True} | options
    with pytest.raises(ConfigError, match=match):
        sample_amed(wrapped, latents * 80, sigmas, **options)


def test_levels_and_first_step_of_the_plan_are_held(wrapped, predictor, latents):
    with pytest.raises(ConfigError, match="trained for amed"):
        sample_amed(wrapped, latents, make_schedule("polynomial", 4, 0.002, 80.0), predictor=predictor, disable=True)
    with pytest.raises(ConfigError, match=f"trained for afs={predictor.plan.afs}"):
        sample_amed(
            wrapped, latents, predictor.plan.levels, predictor=predictor, disable=True, afs=not predictor.plan.afs
        )


def test_a_first_step_about_the_mean_of_the_plan(wrapped, about_mean, latents):
    infos = []
    drawn = draw(wrapped, about_mean, latents, callback=infos.append)
    assert (drawn - Sampler(wrapped.inner_model, about_mean).run(latents).images).abs().max() < 1e-5
    assert len(wrapped.calls) == about_mean.plan.nfe == 5
    x, mean = latents * 80, about_mean.plan.mean.rows()
    torch.testing.assert_close(infos[0]["denoised"], x - 80 * (x - mean) / 6401**0.5, rtol=0, atol=1e-4)
    about_mean.plan = make_plan(5, solver="amed", afs=True)
    assert (drawn - draw(wrapped, about_mean, latents)).abs().max() > 1e-2


def test_a_first_step_about_the_mean_of_each_class(tiny_conditional, about_mean, latents):
    """Only the caller knows the classes."""
    wrapped, labels = Wrapped(tiny_conditional), torch.eye(10)[[3, 1, 4]]
    about_mean.plan = make_plan(5, solver="amed", afs="mean", mean=make_mean(11, 10))
    told = {"extra_args": {"class_labels": labels}}
    mean = mean_of_labels(about_mean.plan.mean.rows(), labels, None)
    drawn = draw(wrapped, about_mean, latents, mean=mean, **told)
    expected = Sampler(tiny_conditional, about_mean).run(latents, class_labels=[3, 1, 4]).images
    assert (drawn - expected).abs().max() < 1e-5
    assert (draw(wrapped, about_mean, latents, mean=mean.flip(0), **told) - expected).abs().max() > 1e-2
    with pytest.raises(ConfigError, match=r"a mean answer for each class.*pass mean="):
        draw(wrapped, about_mean, latents, **told)


def test_constants_start_about_a_mean_too(gaussian_denoiser, latents):
    sigmas, mids = make_schedule("polynomial", 4, 0.002, 80.0), [(0.4, 1.02), (0.6,), (0.5,)]
    mean = make_mean().rows()
    how = {"afs": "mean", "mean": mean}
    drawn = sample_amed(gaussian_denoiser, latents * 80, sigmas.float(), disable=True, predictor=mids, **how)
    expected = sample(gaussian_denoiser, latents * 80, sigmas, make_solver("amed"), [Midpoint(*m) for m in mids], **how)
    assert (drawn - expected).abs().max() < 1e-5


def test_the_callback_sees_a_first_answer_that_was_thresholded(wrapped, predictor, latents):
    options = {"max_order": 2, "thresholding": True}
    predictor.plan = make_plan(5, solver="dpmpp", options=options, midpoint=True, afs=True)
    latents, infos = latents * 3, []
    drawn = draw(wrapped, predictor, latents, callback=infos.append)
    assert (drawn - Sampler(wrapped.inner_model, predictor).run(latents).images).abs().max() < 1e-5
    x = latents * 80
    expected = dynamic_thresholding(x - 80 * x / 6401**0.5)
    torch.testing.assert_close(infos[0]["denoised"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mean": torch.zeros(1, 1, 4, 4)}, r"mean answer of shape \(1, 1, 4, 4\), got samples of \(3, 1, 8, 8\)"),
        ({"mean": torch.zeros(2, 1, 8, 8)}, r"mean answer of shape \(2, 1, 8, 8\), got samples of \(3, 1, 8, 8\)"),
        ({"predictor": [(0.5,)] * 3, "afs": "zero"}, "afs must be True, False, 'mean' or None, got 'zero'"),
        ({"afs": True}, "trained for afs='mean', got afs=True"),
        ({"predictor": [(0.5,)] * 3}, "about the mean answer of a model needs one; pass mean="),
        ({"predictor": [(0.5,)] * 3, "afs": True, "mean": torch.zeros(1, 1, 8, 8)}, "leave mean out"),
    ],
)
def test_a_mean_that_cannot_be_started_about_is_refused(wrapped, about_mean, latents, options, match):
    sigmas = about_mean.plan.levels
    options = {"predictor": about_mean, "afs": "mean", "disable": True} | options
    with pytest.raises(ConfigError, match=match):
        sample_amed(wrapped, latents * 80, sigmas, **options)


def test_a_denoiser_of_the_package_itself(latents):
    """Where k-diffusion is installed with all it needs."""
    external = pytest.importorskip(
        "k_diffusion.external", reason="k-diffusion is not installed with all that it imports", exc_type=ImportError
    )
    network = nn.Conv2d(1, 1, 3, padding=1)
    denoiser = external.VDenoiser(lambda x, t: network(x) * t.reshape(-1, 1, 1, 1))
    sigmas = make_schedule("polynomial", 4, 0.002, 80.0)
    mids = [Midpoint(0.4), Midpoint(0.6), Midpoint(0.5)]
    with torch.no_grad():
        expected = sample(denoiser, latents * 80, sigmas, make_solver("amed"), mids)
    drawn = sample_amed(denoiser, latents * 80, sigmas, disable=True, predictor=mids)
    assert torch.equal(drawn, expected)
