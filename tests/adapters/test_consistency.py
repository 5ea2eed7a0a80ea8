"""Consistency functions as adapters: what they are is said, their coefficients are diffusers', and no ODE solver takes them."""

import pytest
import torch
from torch import nn

import amed_engine
from amed_engine import ConfigError, Sampler, make_solver, sample, wrap
from amed_engine.adapters import ClassifierFree, Consistency, save_program
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.evaluation.comparison import compare

SHAPE = (1, 4, 4)


class Raw(nn.Module):
    """F(x, t) of a state of unit size and a time of any."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t):
        return (self.weight * x + t.view(-1, 1, 1, 1) / 1000).sin()


def function(**options):
    return wrap(Raw(), Consistency(boundary=True, **options), shape=SHAPE)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_published_networks_are_drawn_as_diffusers_draws_them(steps):
    """The scheduler's own loop on the same noise, without its clipping."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas.double()
    generator = torch.Generator().manual_seed(0)
    start = 80 * torch.randn(2, *SHAPE, dtype=torch.float64, generator=generator)
    kept = generator.get_state()
    raw, x = Raw().double(), start
    for t in scheduler.timesteps:
        output = raw(scheduler.scale_model_input(x, t), t.expand(2))
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    generator.set_state(kept)
    noises = [torch.randn(2, *SHAPE, dtype=torch.float64, generator=generator) for _ in range(steps - 1)]
    denoiser = wrap(raw, Consistency(boundary=True), shape=SHAPE)
    given = torch.stack(noises, 1) if noises else None
    with torch.no_grad():
        ours = sample(denoiser, start, levels, make_solver("consistency"), noises=given)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)  # whose coefficients are float32


def test_a_consistency_function_is_the_identity_at_its_lowest_level():
    x = torch.randn(2, *SHAPE)
    assert torch.equal(function(sigma_min=0.01)(x, torch.full((2,), 0.01)).x0, x)
    assert not torch.equal(wrap(Raw(), "cm", shape=SHAPE)(x, torch.full((2,), 0.01)).x0, x)


def test_wrap_says_that_it_is_a_one_step_generator():
    for denoiser in (function(), wrap(Raw(), "consistency", shape=SHAPE)):
        assert denoiser.consistency
        assert "a one-step generator: Sampler(..., solver='consistency')" in str(denoiser)
    assert not wrap(Raw(), "cm", shape=SHAPE).consistency
    assert "one-step" not in str(wrap(Raw(), "cm", shape=SHAPE))


def test_one_that_answers_with_samples_itself_is_asked_as_it_is():
    x, sigma = torch.randn(2, *SHAPE), torch.full((2,), 3.0)
    torch.testing.assert_close(wrap(Raw(), "consistency", shape=SHAPE)(x, sigma).x0, Raw()(x, sigma))


def test_a_fingerprint_is_of_the_boundary_too():
    marks = [fingerprint(each) for each in (function(), function(sigma_min=0.01), wrap(Raw(), "cm", shape=SHAPE))]
    assert len(set(marks)) == 3
    with pytest.raises(ConfigError, match="boundary of Consistency is fixed"):
        function().family.boundary = None


class Classes(Raw):
    def forward(self, x, t, labels):
        return super().forward(x, t) + labels.sum(1).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "work",
    [
        Sampler,
        lambda model: Sampler(model, solver="heun", nfe=4),
        lambda model: compare(model, samples=2, curve_samples=0),
        lambda model: amed_engine.calibrate(model, nfe=4, progress=False),
        lambda model: amed_engine.fit(model, nfe=4, progress=False),
        lambda model: amed_engine.distill(model, nfe=4, progress=False),
        lambda model: amed_engine.search_schedule(model, nfe=4, progress=False),
    ],
    ids=["Sampler", "heun", "compare", "calibrate", "fit", "distill", "search_schedule"],
)
def test_what_integrates_an_ode_refuses_it(work):
    with pytest.raises(ConfigError, match=r"this model is a consistency function.*solver='consistency'\), nfe=1 being"):
        work(function())


def test_guidance_round_it_leaves_it_what_it_is():
    guided = ClassifierFree(wrap(Classes(), "consistency", shape=SHAPE, label_dim=3), 2.0)
    with pytest.raises(ConfigError, match="consistency function"):
        Sampler(guided)
    assert Sampler(guided, solver="consistency", nfe=2).run([1, 2]).images.isfinite().all()


def test_a_file_of_it_says_what_it_is(tmp_path):
    denoiser, path = function(), tmp_path / "function.pt2"
    save_program(denoiser, path)
    with pytest.raises(ConfigError, match="consistency function"):
        Sampler(path)
    images = [Sampler(each, solver="consistency", nfe=3).run([1, 2]).images for each in (path, denoiser)]
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-5)
