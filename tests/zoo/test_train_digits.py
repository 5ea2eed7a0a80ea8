"""The training script of the bundled model: its target, its noise, and what it writes."""

import json
import math

import pytest
import torch

pytest.importorskip("sklearn")

from amed_engine.checkpoints import load_model
from amed_engine.zoo import train_digits
from amed_engine.zoo.train_digits import UNLABELLED, Digits, Recipe

TINY = train_digits.NETWORK | {"model_channels": 8, "num_blocks": 1, "attn_resolutions": []}
SHORT = Recipe(steps=3, batch=4, warmup=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return train_digits.load_digits(CPU)


def test_digits_fill_the_range_of_the_network(digits):
    assert digits.images.shape == (1797, 1, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (-1, 1)
    assert digits.labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize("label", [3, UNLABELLED])
def test_posterior_mean_is_bayes_rule(digits, label):
    """Against Bayes' rule written out in float64, one image at a time."""
    sigma = 0.8
    generator = torch.Generator().manual_seed(0)
    noisy = digits.images[:1] + sigma * torch.randn(1, 1, 8, 8, generator=generator)
    total, mean = 0.0, torch.zeros(1, 8, 8, dtype=torch.float64)
    for image, own in zip(digits.images.double(), digits.labels, strict=True):
        if label in (own, UNLABELLED):
            likelihood = math.exp(-(noisy[0].double() - image).square().sum().item() / (2 * sigma**2))
            total, mean = total + likelihood, mean + likelihood * image
    got = train_digits.posterior_mean(noisy, torch.tensor([sigma]), torch.tensor([label]), digits)
    torch.testing.assert_close(got[0].double(), mean / total, rtol=0, atol=2e-4)


def test_noise_levels_of_a_batch_are_spread_over_the_distribution(digits):
    recipe = Recipe(batch=256)
    clean, noisy, sigma, labels = train_digits.draw_batch(digits, recipe, torch.Generator().manual_seed(0))
    logs = sigma.log()
    assert logs.mean().item() == pytest.approx(recipe.p_mean, abs=0.02)
    assert logs.std().item() == pytest.approx(recipe.p_std, abs=0.03)
    noise = (noisy - clean) / sigma[:, None, None, None]
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert 0.02 < (labels == UNLABELLED).float().mean() < 0.2


def test_average_forgets_its_start():
    """Power-function weights: the average of 1 .. n with weights ∝ t^p is n·(p + 1)/(p + 2) for large n."""
    net, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step in range(1, 2001):
        torch.nn.init.constant_(net.weight, float(step))
        train_digits.update_average(average, net, step, power=16.0)
    assert average.weight.item() == pytest.approx(2000 * 17 / 18, rel=1e-3)


def test_learning_rate_warms_up_and_ends_at_zero():
    recipe = Recipe()
    assert train_digits.learning_rate(0.0, 0, recipe) == pytest.approx(recipe.lr / recipe.warmup)
    assert train_digits.learning_rate(0.5, 10_000, recipe) == pytest.approx(recipe.lr / 2)
    assert train_digits.learning_rate(1.0, 10_000, recipe) == 0


def test_training_is_repeatable_and_what_it_writes_loads(tmp_path):
    first = train_digits.train(SHORT, tmp_path / "a", CPU, TINY)
    train_digits.train(SHORT, tmp_path / "b", CPU, TINY)
    a, b = (load_model(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert all(torch.equal(a[name], tensor) for name, tensor in first.state_dict().items())
    training = json.loads((tmp_path / "a" / "config.json").read_text())["training"]
    assert training["steps"] == SHORT.steps
    assert training["seed"] == SHORT.seed
    assert math.isfinite(training["loss_to_image"])
