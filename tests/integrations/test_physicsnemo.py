"""AMEDSolver, called as PhysicsNeMo's `sample` calls its solvers."""

import itertools

import pytest
import torch

from amed_engine import AMEDPredictor, ConfigError, Midpoint, Sampler, make_plan, sample
from amed_engine.integrations.physicsnemo import AMEDSolver
from amed_engine.sampling.denoiser import as_denoised
from amed_engine.solvers import make_solver


def right_hand_side(model):
    """dx/dt = (x - D) / t, what a noise scheduler's `get_denoiser` makes of an x0-predictor."""

    def denoiser(x, t):
        return (x - as_denoised(model(x, t)).x0) / t.reshape(-1, *[1] * (x.dim() - 1))

    return denoiser


class StandIn:
    """Of the package, what a solver meets."""

    right_hand_side = staticmethod(right_hand_side)

    @staticmethod
    def sample(solver, x, time_steps):
        """The loop of physicsnemo.diffusion.samplers.sample: scalar times expanded to the batch."""
        for t_cur, t_next in itertools.pairwise(time_steps):
            x = solver.step(x, t_cur.expand(len(x)), t_next.expand(len(x)))
        return x


class Package:
    """The package itself."""

    def __init__(self):
        from physicsnemo.diffusion import samplers
        from physicsnemo.diffusion.noise_schedulers import EDMNoiseScheduler

        self.samplers, self.scheduler = samplers, EDMNoiseScheduler()

    def right_hand_side(self, model):
        return self.scheduler.get_denoiser(x0_predictor=lambda x, t: as_denoised(model(x, t)).x0, denoising_type="ode")

    def sample(self, solver, x, time_steps):
        assert isinstance(solver, self.samplers.Solver)
        # Their schedule must not matter: 99 steps would be another answer.
        return self.samplers.sample(solver.denoiser, x, self.scheduler, 99, solver=solver, time_steps=time_steps)


@pytest.fixture(params=["stand-in", "package"])
def physicsnemo(request):
    if request.param == "stand-in":
        return StandIn()
    pytest.importorskip("physicsnemo", reason="nvidia-physicsnemo is not installed")
    try:
        return Package()
    except ImportError as error:
        pytest.skip(f"nvidia-physicsnemo is installed but cannot be imported: {error}")


@pytest.fixture
def block(tiny_model):
    return list(tiny_model.model.enc.values())[-1]


@pytest.fixture
def without_afs(predictor):
    predictor.plan = make_plan(6, solver="amed", afs=False)
    return predictor


def test_its_steps_are_the_engine_s(physicsnemo, tiny_model, without_afs, latents, block):
    expected = Sampler(tiny_model, without_afs).run(latents).images
    solver = AMEDSolver(physicsnemo.right_hand_side(tiny_model), without_afs, bottleneck=block)
    with torch.no_grad():
        drawn = physicsnemo.sample(solver, latents * 80, without_afs.plan.levels.float())
    assert (drawn - expected).abs().max() < 1e-4
    assert not block._forward_hooks


def test_samples_at_times_of_their_own_go_as_if_alone(tiny_model, without_afs, latents, block):
    solver = AMEDSolver(right_hand_side(tiny_model), without_afs, bottleneck=block)
    t_cur, t_next = torch.tensor([80.0, 5.0, 0.3]), torch.tensor([10.0, 0.5, 0.002])
    x = latents * t_cur.reshape(-1, 1, 1, 1)
    with torch.no_grad():
        together = solver.step(x, t_cur, t_next)
        alone = torch.cat([solver.step(x[k : k + 1], t_cur[k : k + 1], t_next[k : k + 1]) for k in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        for k in range(3):
            levels = torch.stack([t_cur[k], t_next[k]])
            direct = sample(tiny_model, x[k : k + 1], levels, make_solver("amed"), without_afs)
            torch.testing.assert_close(alone[k : k + 1], direct, rtol=1e-5, atol=1e-4)


def test_the_last_step_goes_to_zero_without_dividing_by_it(physicsnemo, gaussian_denoiser, latents):
    solver, latents = AMEDSolver(right_hand_side(gaussian_denoiser), Midpoint(0.5)), latents.double()
    steps = torch.tensor([80.0, 3.0, 0.1, 0.0], dtype=torch.float64)
    drawn = physicsnemo.sample(solver, latents * 80, steps)
    expected = sample(
        gaussian_denoiser, latents * 80, steps[:-1], make_solver("amed"), [Midpoint(0.5)] * 2, denoise_to_zero=True
    )
    assert (drawn - expected).abs().max() < 1e-10
    # One sample ends, the other goes on.
    mixed = solver.step(latents[:2], steps[[2, 1]], steps[[3, 2]])
    alone = solver.step(latents[1:2], steps[1:2], steps[2:3])
    torch.testing.assert_close(mixed[1:], alone)
    torch.testing.assert_close(mixed[:1], gaussian_denoiser(latents[:1], steps[2:3]))


def test_gradients_reach_the_predictor(gaussian_denoiser, latents):
    solver = AMEDSolver(right_hand_side(gaussian_denoiser), AMEDPredictor())
    solver.step(latents, torch.full((3,), 3.0), torch.full((3,), 0.5)).sum().backward()
    assert all(parameter.grad is not None for parameter in solver.predictor.fc_r.parameters())


def test_what_cannot_work_is_refused(gaussian_denoiser, latents, predictor):
    solver = AMEDSolver(gaussian_denoiser, Midpoint(0.5))
    with pytest.raises(ConfigError, match=r"t_cur must have shape \(3,\), one time per sample, got \(\)"):
        solver.step(latents, torch.tensor(3.0), torch.tensor(0.5))
    with pytest.raises(ConfigError, match="constants per step cannot be used"):
        AMEDSolver(gaussian_denoiser, [Midpoint(0.5), Midpoint(0.4)])
    predictor.plan = make_plan(6, solver="ipndm", midpoint=True)
    with pytest.raises(ConfigError, match="remembers earlier steps"):
        AMEDSolver(gaussian_denoiser, predictor)
