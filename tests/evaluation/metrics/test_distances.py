"""Distances between image sets, against numbers worked out by hand."""

import math

import pytest
import torch

from amed_engine.errors import ConfigError
from amed_engine.evaluation import metrics


def test_rmse_of_a_known_shift():
    truth = torch.zeros(3, 1, 2, 2)
    images = torch.tensor([0.0, 0.3, 0.4]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert metrics.per_image_rmse(images, truth).tolist() == pytest.approx([0.0, 0.3, 0.4])
    assert metrics.rmse(images, truth) == pytest.approx(math.sqrt((0.09 + 0.16) / 3))


def test_psnr_is_that_of_bytes():
    """20 log10(255 / error) of images in 0 .. 255 is the same number as of those in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(256, (2, 4, 3, 8, 8), generator=generator)
    mse = (a - b).double().square().mean().item()
    got = metrics.psnr(metrics.rmse(a / 127.5 - 1, b / 127.5 - 1))
    assert got == pytest.approx(10 * math.log10(255**2 / mse), abs=1e-5)
    assert metrics.psnr(0.0) == math.inf


def test_quantiles_are_of_the_images():
    distances = metrics.Distances.of(torch.arange(101.0))
    assert list(distances.quantiles.values()) == pytest.approx([5, 25, 50, 75, 95])
    assert distances.median == 50
    assert distances.rmse == pytest.approx(math.sqrt(sum(i * i for i in range(101)) / 101))


def test_equal_sets_are_json():
    assert metrics.Distances.of(torch.zeros(2)).to_json()["psnr"] is None


@pytest.mark.parametrize("shapes", [((2, 1, 4, 4), (1, 1, 4, 4)), ((0, 1, 4, 4), (0, 1, 4, 4))])
def test_other_shapes_are_refused(shapes):
    """Broadcasting would give a number."""
    with pytest.raises(ConfigError, match="equal shape"):
        metrics.rmse(*(torch.zeros(shape) for shape in shapes))
