"""Named schedules over ranges of noise levels of every scale."""

import math

import pytest
import torch

from amed_engine import make_schedule

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
