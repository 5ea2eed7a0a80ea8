"""Named schedules over ranges of noise levels of every scale."""

import math

import pytest
import torch

from amed_engine import make_schedule
from amed_engine.solvers.schedule import DiscreteTime

RANGES = [(0.002, 80.0), (4e-5, 1.6), (0.06, 2560.0), (0.13, 80.0), (0.2, 8000.0), (1.0, 1000.0), (10.0, 11.0)]


@pytest.mark.parametrize("name", ["polynomial", "logsnr", "time_uniform"])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_levels_fall_from_one_end_of_the_range_to_the_other(name, low, high):
    levels = make_schedule(name, 9, low, high)
    assert levels[[0, -1]].tolist() == pytest.approx([high, low], rel=1e-9)
    assert bool((levels.diff() < 0).all())


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_vp_time_of_a_large_smallest_level_has_a_constant_beta(rho):
    """log(1 + sigma²) is then beta·t, so that its roots are equally spaced."""
    levels = make_schedule("time_uniform", 6, 0.2, 8000.0, rho)
    ends = [math.log1p(sigma**2) ** (1 / rho) for sigma in (8000.0, 0.2)]
    expected = torch.linspace(*ends, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.log1p(levels**2) ** (1 / rho), expected, rtol=1e-9, atol=0)


def test_vp_time_that_rises_is_the_published_one():
    beta = (2 * (math.log1p(0.13**2) / 1e-3 - math.log1p(80.0**2)) / (1e-3 - 1), 0.0)
    beta = (beta[0], math.log1p(80.0**2) - beta[0] / 2)
    assert beta[0] < 0 < beta[0] + beta[1]
    t = torch.linspace(1, 1e-3, 5, dtype=torch.float64)
    expected = torch.expm1(beta[0] * t**2 / 2 + beta[1] * t).sqrt()
    torch.testing.assert_close(make_schedule("time_uniform", 5, 0.13, 80.0), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("steps", [2, 3, 1000])
def test_discrete_time_is_that_of_a_search_in_the_sorted_table(steps):
    """The step is counted, which ONNX can do; it is that of torch.searchsorted, on and between and beyond all levels."""
    time = DiscreteTime.of((1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)).cumprod(0))
    own = time.sigma(time.grid())
    sigma = torch.cat([own, own * (1 + 1e-12), torch.logspace(-6, 6, 999, dtype=torch.float64)])
    at, xs, ys = -torch.log1p(sigma**2) / 2, time.log_alpha.flip(0), time.grid().flip(0)
    k = torch.searchsorted(xs, at).clamp(1, steps - 1)
    expected = ys[k - 1] + (at - xs[k - 1]) / (xs[k] - xs[k - 1]) * (ys[k] - ys[k - 1])
    assert torch.equal(time.time(sigma), expected)
    assert torch.equal(time.time(sigma[0]), expected[0])
