"""Streaming statistics against numpy, the Frechet distance against scipy and closed forms, the file against EDM's."""

import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.evaluation.metrics import Statistics, frechet_distance


def features(count=200, size=6, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing + offset


def streamed(x, *sizes):
    statistics = Statistics()
    for part in x.split(list(sizes)):
        statistics.update(part)
    return statistics


def test_mean_and_covariance_are_numpy_s():
    x = features()
    statistics = streamed(x, 1, 100, 37, 62)
    assert statistics.count == 200
    np.testing.assert_allclose(statistics.mu, x.mean(0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(statistics.sigma, np.cov(x.numpy(), rowvar=False), rtol=1e-12, atol=1e-13)


@given(st.permutations(range(8)), st.integers(1, 24))
def test_order_and_size_of_batches_do_not_matter(order, first):
    x = features(64)
    blocks = torch.cat([x.chunk(8)[i] for i in order])
    a, b = streamed(x, 64), streamed(blocks, first, 30 - first, 34)
    scale = a.sigma.abs().max().item()
    torch.testing.assert_close(a.mu, b.mu, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.sigma, b.sigma, rtol=0, atol=1e-12 * scale)


def test_a_mean_far_from_zero_costs_no_digits():
    """Σ x xᵀ - N mu muᵀ, the textbook formula, has no digit left here."""
    x = features(offset=0.0)
    far = streamed(x + 1e8, 50, 150)
    expected = np.cov((x + 1e8).numpy() - 1e8, rowvar=False)  # what is left of x in float64, shifted back exactly
    np.testing.assert_allclose(far.sigma, expected, rtol=1e-6, atol=1e-7)
    textbook = (x + 1e8).T @ (x + 1e8) - 200 * (x + 1e8).mean(0).outer((x + 1e8).mean(0))
    assert (textbook / 199 - torch.from_numpy(expected)).abs().max() > 1


def test_merging_is_having_seen_both():
    x = features()
    merged = streamed(x[:120], 120).merge(streamed(x[120:], 30, 50)).merge(Statistics())
    whole = streamed(x, 200)
    assert merged.count == 200
    torch.testing.assert_close(merged.mu, whole.mu, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged.sigma, whole.sigma, rtol=1e-12, atol=1e-12)


def test_merging_leaves_the_other_alone():
    x = features()
    other = streamed(x[:50], 50)
    before = other.mu.clone(), other.sigma.clone()
    Statistics().merge(other).update(x[50:])
    assert torch.equal(other.mu, before[0])
    assert torch.equal(other.sigma, before[1])


# ---- Frechet distance


def test_distance_is_scipy_s():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = streamed(features(seed=1), 200), streamed(features(seed=2, offset=0.3), 200)
    root = linalg.sqrtm(a.sigma.numpy() @ b.sigma.numpy()).real
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma.numpy() + b.sigma.numpy() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_distance_of_diagonal_covariances_has_a_closed_form():
    """|mu_a - mu_b|² + Σ (s_a - s_b)² with s the standard deviations."""
    sa, sb = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([0.5, 2.0, 3.0]).double()
    a = Statistics(torch.zeros(3).double(), (sa**2).diag(), 2)
    b = Statistics(torch.ones(3).double(), (sb**2).diag(), 2)
    assert frechet_distance(a, b) == pytest.approx(3 + 0.25 + 9, rel=1e-14)
    assert frechet_distance(b, a) == pytest.approx(3 + 0.25 + 9, rel=1e-14)


def test_singular_covariances_do_no_harm():
    """10 images with 40 features: rank 9. The same points turned and moved by |v| are |v|² away in a plane of their own."""
    x = features(10, 40)
    moved = x + torch.linspace(-1, 1, 40, dtype=torch.float64)
    expected = torch.linspace(-1, 1, 40, dtype=torch.float64).square().sum().item()
    a = streamed(x, 10)
    assert frechet_distance(a, streamed(moved, 4, 6)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * a.sigma.trace().item())
    assert frechet_distance(a, streamed(2 * x, 10)) == pytest.approx(
        (a.mu.square().sum() + a.sigma.trace()).item(), rel=1e-9
    )


def test_constant_features_are_a_distance_of_means():
    a, b = Statistics().update(torch.zeros(4, 3)), Statistics().update(torch.full((4, 3), 2.0))
    assert frechet_distance(a, b) == pytest.approx(12)


# ---- files


def test_the_file_is_edm_s(tmp_path):
    statistics = streamed(features(), 200)
    statistics.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert sorted(file) == ["mu", "sigma"]
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_array_equal(file["sigma"], statistics.sigma)
    np.savez(tmp_path / "theirs.npz", mu=statistics.mu.numpy(), sigma=statistics.sigma.numpy())
    for name in ("s.npz", "theirs.npz"):
        back = Statistics.load(tmp_path / name)
        assert torch.equal(back.mu, statistics.mu)
        torch.testing.assert_close(back.sigma, statistics.sigma, rtol=0, atol=0)
        assert frechet_distance(back, statistics) == pytest.approx(0, abs=1e-12 * statistics.sigma.trace().item())


def test_nothing_is_added_to_statistics_of_a_file(tmp_path):
    """Their number of images, the weight of what they would be merged with, is not known."""
    Statistics().update(features()).save(tmp_path / "s.npz")
    with pytest.raises(ConfigError, match="how many images"):
        Statistics.load(tmp_path / "s.npz").update(features())
    with pytest.raises(ConfigError, match="how many images"):
        Statistics().merge(Statistics.load(tmp_path / "s.npz"))


GOOD = {"mu": np.zeros(2), "sigma": np.eye(2)}
BAD = {
    "sigma missing": ({"mu": np.zeros(2)}, "lacks .*sigma"),
    "another size": ({**GOOD, "mu": np.zeros(3)}, "expected mu"),
    "a matrix as mean": ({**GOOD, "mu": np.zeros((1, 2))}, "expected mu"),
    "empty": ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "expected mu"),
    "not finite": ({**GOOD, "mu": np.array([0, np.nan])}, "NaN"),
    "not symmetric": ({**GOOD, "sigma": np.array([[1.0, 0.5], [0, 1]])}, "no covariance"),
    "a negative variance": ({**GOOD, "sigma": np.diag([1.0, -1.0])}, "no covariance"),
    "objects": ({**GOOD, "mu": np.array([{}, {}], dtype=object)}, "not a readable"),
    "text": ({**GOOD, "mu": np.array(["a", "b"])}, "real numbers"),
    "complex": ({**GOOD, "mu": np.zeros(2, complex)}, "real numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(case, tmp_path):
    arrays, message = BAD[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(FileFormatError, match=message):
        Statistics.load(tmp_path / "bad.npz")


@pytest.mark.parametrize("kept", [0, 10, 200, 500])
def test_truncated_files_are_named(kept, tmp_path):
    file = tmp_path / "s.npz"
    streamed(features(), 200).save(file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(FileFormatError, match="damaged"):
        Statistics.load(file)


def test_files_that_unpack_to_too_much_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("amed_engine.evaluation.metrics.statistics.MAX_BYTES", 1 << 16)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", bytes(1 << 17))
    with pytest.raises(FileFormatError, match="unpacks to 131072 bytes"):
        Statistics.load(tmp_path / "bomb.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileFormatError, match=r"none\.npz does not exist"):
        Statistics.load(tmp_path / "none.npz")


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ConfigError, match="floats"):
        Statistics().update(torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match="NaN"):
        Statistics().update(torch.tensor([[float("nan")]]))
    with pytest.raises(ConfigError, match="at least 2 images"):
        Statistics().mu  # noqa: B018
    with pytest.raises(ConfigError, match="at least 2 images, got 1"):
        Statistics().update(torch.zeros(1, 3)).save(tmp_path / "a.npz")
    with pytest.raises(ConfigError, match=r"\.npz"):
        Statistics().update(torch.zeros(2, 3)).save(tmp_path / "a.npy")
    with pytest.raises(ConfigError, match="3 and 4 features"):
        frechet_distance(Statistics().update(torch.zeros(2, 3)), Statistics().update(torch.zeros(2, 4)))
