"""Precision and recall against the definition, written out one pair of points at a time."""

import math

import pytest
import torch

from amed_engine.errors import ConfigError
from amed_engine.evaluation.metrics import precision_recall


def naive(samples, data, k):
    def inside(points, centres):
        def radius(i):
            return sorted(math.dist(centres[i], c) for j, c in enumerate(centres) if j != i)[k - 1]

        radii = [radius(i) for i in range(len(centres))]
        hits = [any(math.dist(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(hits) / len(hits)

    return inside(samples.tolist(), data.tolist()), inside(data.tolist(), samples.tolist())


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_it_is_the_definition(k, chunk):
    generator = torch.Generator().manual_seed(k)
    samples = torch.randn(40, 3, generator=generator).double() * 0.7
    data = torch.randn(31, 3, generator=generator).double() + 0.5 + k / 2
    got = precision_recall(samples, data, k, chunk)
    assert got == pytest.approx(naive(samples, data, k))
    assert 0 < got.precision < 1
    assert 0 < got.recall < 1


def test_a_set_covers_itself_and_nothing_far_away():
    points = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 100) == (0, 0)


def test_one_mode_of_two_is_precise_and_forgets_half():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 200, 2, generator=generator)
    data = torch.cat([left, right + 50])
    precision, recall = precision_recall(torch.randn(200, 2, generator=generator), data)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match=r"\(M, 3\) as the manifold's, got \(5, 2\)"):
        precision_recall(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ConfigError, match=r"more than k points, got \(3, 2\)"):
        precision_recall(torch.zeros(5, 2), torch.zeros(3, 2))
