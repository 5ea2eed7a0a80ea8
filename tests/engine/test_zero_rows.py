"""A row of zeros is a row: the state becomes zero there, in every consumer of a program, as the formula says."""

import numpy as np
import pytest
import torch

from amed_engine import (
    CoefficientPredictor,
    ConstantPredictor,
    Sampler,
    Stepper,
    load_package,
    load_predictor,
    make_plan,
    read_plan,
    save_predictor,
)
from amed_engine.engine.export.write_plan import make_tableau

ZERO = {"first": [0], "middle": [1], "last": [2], "all": [0, 1, 2], "of the anchor": "a", "of the answers": "b"}


def make(which, afs: bool = False, codes: int = 0) -> CoefficientPredictor:
    predictor = CoefficientPredictor(3, 80.0, afs=afs, codes=codes, inputs=20 if codes else 0)
    rows = torch.linspace(0.2, 0.5, 12, dtype=torch.float64).view(3, 4)
    if which == "a":
        rows[:, 0] = 0
    elif which == "b":
        rows[:, 1:] = 0
    else:
        rows[which] = 0
    with torch.no_grad():
        predictor.coefficients.copy_(rows)
    predictor.plan = make_plan(
        None, solver="nonstationary", schedule=torch.tensor([80.0, 9.0, 1.0, 0.1]), afs=afs, midpoint=True
    )
    return predictor


def denoise(x, sigma):
    """The exact denoiser of unit Gaussian data, and a constant beside it: what is zero is seen."""
    return (x + 0.3 * sigma.view(-1, 1, 1, 1) ** 2) / (1 + sigma.view(-1, 1, 1, 1) ** 2)


class Network(torch.nn.Module):
    img_channels, img_resolution, sigma_min, sigma_max = 1, 4, 0.002, 80.0

    def forward(self, x, sigma, labels=None):
        return denoise(x, sigma)


def by_formula(predictor: CoefficientPredictor, z: torch.Tensor) -> torch.Tensor:
    """x_{i+1} = a_i x_0 + sum of b_ij D_j, newest first."""
    x0 = z.double() * 80
    x, answers = x0, []
    for i, sigma in enumerate(predictor.plan.levels[:-1]):
        if not (predictor.afs and i == 0):
            answers.insert(0, denoise(x, sigma))
        a, *b = predictor.coefficients.detach()[i]
        x = a / 80 * x0 + sum((c * d for c, d in zip(b, answers, strict=False)), torch.zeros_like(x0))
    return x


LATENTS = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("which", ZERO.values(), ids=ZERO)
def test_a_sampler_and_a_table_follow_the_formula(tmp_path, which, afs):
    predictor = make(which, afs)
    save_predictor(predictor, tmp_path / "p.safetensors")
    sampler = Sampler(Network(), load_predictor(tmp_path / "p.safetensors"))
    images = sampler.run(LATENTS).images
    np.testing.assert_allclose(images.numpy(), by_formula(predictor, LATENTS).numpy(), rtol=1e-4, atol=1e-6)
    sampler.export(tmp_path / "plan.json", "plan")
    stepper = Stepper(read_plan(tmp_path / "plan.json"), (LATENTS * 80).numpy())
    while not stepper.done:
        stepper.advance(denoise(torch.from_numpy(stepper.points), torch.from_numpy(stepper.sigma)).numpy())
    np.testing.assert_allclose(stepper.result, images.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ZERO.values(), ids=ZERO)
def test_the_c_library_follows_the_engine(library, which):
    sampler = Sampler(Network(), make(which))
    got = library.sample(
        make_tableau(sampler).dumps(),
        (LATENTS * 80).numpy(),
        lambda x, sigma: (denoise(torch.from_numpy(x), torch.from_numpy(sigma)).numpy(), None),
    )
    np.testing.assert_allclose(got, sampler.run(LATENTS).images.numpy(), rtol=1e-5, atol=1e-6)


def test_an_exported_program_follows_the_engine(tmp_path):
    sampler = Sampler(Network(), make([1]))
    sampler.export(tmp_path / "loop.pt2", "exported", verify=False)
    got = load_package(tmp_path / "loop.pt2").run(LATENTS).images
    np.testing.assert_allclose(got.numpy(), sampler.run(LATENTS).images.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codes", [1, 2])
def test_rows_and_heads_of_zeros_that_read_a_bottleneck(codes):
    predictor = make([0, 2], codes=codes)

    class Reading(Network):
        def forward(self, x, sigma, labels=None):
            return denoise(x, sigma), x.expand(-1, 4, -1, -1)

    images = Sampler(Reading(), predictor).run(LATENTS).images
    np.testing.assert_allclose(images.numpy(), by_formula(predictor, LATENTS).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("points", [1, 2])
def test_constants_of_zero_stand_still(tmp_path, points):
    """AMED and EPD with scale_dir = 0 go nowhere in that interval, in a sampler and in a table."""
    predictor = ConstantPredictor(2, points)
    with torch.no_grad():
        predictor.scale_dir[:] = 0
    options = {"points": points} if points > 1 else None
    predictor.plan = make_plan(
        None, solver="amed", schedule=torch.tensor([80.0, 9.0, 1.0]), options=options, midpoint=True, afs=False
    )
    sampler = Sampler(Network(), predictor)
    images = sampler.run(LATENTS).images
    np.testing.assert_allclose(images.numpy(), (LATENTS * 80).numpy(), rtol=1e-5)
    sampler.export(tmp_path / "plan.json", "plan")
    stepper = Stepper(read_plan(tmp_path / "plan.json"), (LATENTS * 80).numpy())
    while not stepper.done:
        stepper.advance(denoise(torch.from_numpy(stepper.points), torch.from_numpy(stepper.sigma)).numpy())
    np.testing.assert_allclose(stepper.result, images.numpy(), rtol=1e-5)


def test_the_scheduler_of_diffusers_takes_constants_of_zero():
    diffusers = pytest.importorskip("diffusers")
    assert diffusers
    from amed_engine.integrations.diffusers import AMEDScheduler

    predictor = ConstantPredictor(2)
    with torch.no_grad():
        predictor.scale_dir[:] = 0
    predictor.plan = make_plan(None, solver="amed", schedule=torch.tensor([80.0, 9.0, 1.0]), midpoint=True, afs=False)
    scheduler = AMEDScheduler.from_predictor(predictor, {"prediction_type": "sample"})
    scheduler.set_timesteps(2)
    x = LATENTS * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, torch.ones(3)), t, x).prev_sample
    assert bool(x.isfinite().all())
