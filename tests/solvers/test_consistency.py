"""Multistep consistency sampling: Song et al. 2023 (arXiv:2303.01469), algorithm 1, as a program."""

import math

import pytest
import torch

from amed_engine import ConfigError, Plan, make_plan, make_schedule, make_solver, sample
from amed_engine.solvers.mean import Mean
from amed_engine.solvers.program import Program

MU, SD, EPS = 2.0, 0.5, 0.002
CONSISTENCY = make_solver("consistency")


def to_end(sigma):
    """How far the ODE of N(MU, SD²) draws states together from sigma to EPS."""
    return ((SD**2 + EPS**2) / (SD**2 + sigma**2)) ** 0.5


def of_gaussian(x, sigma):
    """The consistency function of N(MU, SD²), exactly: the end at EPS of the ODE's solution through x at sigma."""
    return MU + (x - MU) * to_end(sigma.view(-1, *[1] * (x.dim() - 1)))


def given(steps, batch=3, seed=0):
    """Levels, a start and the noises of `steps` evaluations."""
    generator = torch.Generator().manual_seed(seed)
    levels = make_schedule("polynomial", steps + 1, EPS, 80.0, 7.0)
    x, *noises = torch.randn(steps, batch, 1, 4, 4, dtype=torch.float64, generator=generator)
    return levels, x * 80, torch.stack(noises, 1) if noises else None


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_walk_is_the_published_algorithm_written_out(steps):
    levels, x, noises = given(steps)
    got = sample(of_gaussian, x, levels, CONSISTENCY, noises=noises, trajectory=True)
    states = [x]
    for i, sigma in enumerate(levels[:-1].tolist()):
        answer = of_gaussian(states[-1], torch.full((len(x),), sigma, dtype=torch.float64))
        last = i + 1 == steps
        states.append(answer if last else answer + math.sqrt(levels[i + 1] ** 2 - EPS**2) * noises[:, i])
    torch.testing.assert_close(got, torch.stack(states), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("steps", range(1, 6))
def test_samples_of_a_gaussian_have_its_mean_and_its_deviation(steps):
    """Of 100,000 numbers: deviation to 1 %, four times its own; mean to 0.007, four times its own, and what one step's start
    about 0 in place of MU leaves, MU to_end(80)."""
    count = 100_000
    generator = torch.Generator().manual_seed(steps)
    start, *more = torch.randn(steps, count, 1, dtype=torch.float64, generator=generator)
    noises = torch.stack(more, 1) if more else None
    images = sample(
        of_gaussian, start * 80, make_schedule("polynomial", steps + 1, EPS, 80.0), CONSISTENCY, noises=noises
    )
    assert images.std().item() == pytest.approx(SD, rel=0.01)
    assert images.mean().item() == pytest.approx(MU, abs=0.007 + MU * to_end(80.0) * (steps == 1))


def test_a_step_asks_at_the_levels_given_and_not_at_the_last():
    levels, x, noises = given(3)
    asked = []

    def told(x, sigma):
        asked.append(sigma[0].item())
        return of_gaussian(x, sigma)

    sample(told, x, levels, CONSISTENCY, noises=noises)
    assert asked == levels[:-1].tolist()


def test_an_update_reads_the_answer_and_one_noise_and_lets_go_of_it():
    program = Program.build(CONSISTENCY, make_schedule("polynomial", 5, EPS, 80.0))
    assert program.noises == 3
    assert [len(update.columns) for (update,) in program.updates] == [2, 2, 2, 1]
    assert {update.keep for (update,) in program.updates} == {3}


def test_its_own_schedule_is_polynomial_and_other_levels_are_taken():
    plan = make_plan(2, solver="consistency")
    assert (plan.schedule, plan.nfe, plan.afs, plan.options) == ("polynomial", 2, False, ())
    assert plan.sigmas == tuple(make_schedule("polynomial", 3, 0.002, 80.0).tolist())
    assert make_plan(2, solver="euler").schedule == "time_uniform"
    assert make_plan(None, solver="consistency", schedule=torch.tensor([80.0, 0.6, 0.002])).nfe == 2
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("afs", [True, "mean"])
def test_its_first_answer_is_no_mean_to_be_foreseen(afs):
    levels, x, noises = given(3)
    refused = pytest.raises(ConfigError, match=r"takes no analytic first step.*leave afs out")
    with refused:
        make_plan(2, solver="consistency", afs=afs)
    with refused:
        sample(of_gaussian, x, levels, CONSISTENCY, afs=afs, mean=None if afs is True else x[:1], noises=noises)
    with refused:
        Plan.from_json(make_plan(2, solver="consistency").to_json() | {"afs": {True: "zero"}.get(afs, afs)})


def test_a_measured_mean_at_hand_is_left_alone():
    mean = Mean.of(torch.zeros(1, 1, 4, 4), classes=0, sigma=80.0, latents=32, model=None, dtype="float32")
    assert make_plan(3, solver="consistency", mean=mean).afs is False


def test_predictors_and_options_are_refused():
    with pytest.raises(ConfigError, match="takes no predictor"):
        make_plan(4, solver="consistency", midpoint=True)
    with pytest.raises(ConfigError, match="has no option thresholding; valid options: none"):
        make_solver("consistency", thresholding=True)


@pytest.mark.parametrize(
    ("solver", "count", "message"),
    [
        ("consistency", 0, "adds 2 noises to each sample, got 0; pass noises= to sample, or seeds to Sampler.run"),
        ("consistency", 1, "adds 2 noises to each sample, got 1"),
        ("euler", 2, "adds 0 noises to each sample, got 2; leave noises out"),
    ],
)
def test_as_many_noises_are_given_as_are_added(solver, count, message):
    levels, x, noises = given(3)
    with pytest.raises(ConfigError, match=message):
        sample(of_gaussian, x, levels, make_solver(solver), noises=noises[:, :count] if count else None)


@pytest.mark.parametrize("change", [lambda z: z.float(), lambda z: z[:2], lambda z: z[..., :2], lambda z: z[:, 0]])
def test_noises_have_the_shape_and_dtype_of_x(change):
    levels, x, noises = given(3)
    with pytest.raises(
        ConfigError, match=r"noises must be \(B, K, ...\) like x, torch.float64 of \(3, K, 1, 4, 4\), got"
    ):
        sample(of_gaussian, x, levels, CONSISTENCY, noises=change(noises))


def test_gradients_through_a_walk():
    levels, x, noises = given(2)
    x.requires_grad_(), noises.requires_grad_()
    sample(of_gaussian, x, levels, CONSISTENCY, noises=noises).sum().backward()
    middle = to_end(levels[1].item())
    torch.testing.assert_close(x.grad, torch.full_like(x, to_end(80.0) * middle), rtol=1e-12, atol=0)
    added = math.sqrt(levels[1] ** 2 - EPS**2)
    torch.testing.assert_close(noises.grad, torch.full_like(noises, added * middle), rtol=1e-12, atol=0)
