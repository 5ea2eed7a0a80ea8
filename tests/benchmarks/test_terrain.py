"""The terrains of another's generator: what is read of its wheel, and heights and roughness by hand."""

import math
import sys
import zipfile
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def terrain(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import terrain

    yield terrain
    sys.modules.pop("terrain", None)


def test_another_wheel_is_refused(terrain, tmp_path):
    (tmp_path / terrain.WHEEL).write_bytes(b"another")
    with pytest.raises(ValueError, match="SHA-256"):
        terrain.download(tmp_path)


def test_the_network_is_taken_out_of_its_wheel_and_nothing_else(terrain, tmp_path):
    wheel = tmp_path / terrain.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(terrain.WEIGHTS, b"onnx")
        archive.writestr("../outside.py", b"code")
    assert terrain.network(wheel).read_bytes() == b"onnx"
    assert {path.name for path in tmp_path.iterdir()} == {wheel.name, Path(terrain.WEIGHTS).name}


def test_heights_are_their_formula(terrain):
    """Of (h / 0.1) the inverse hyperbolic sine, over that of the highest, is 0 .. 1."""
    metres = torch.tensor([0.0, 0.05, 3.0, terrain.RANGE])
    told = 2 * torch.asinh(metres / 0.1) / math.asinh(terrain.RANGE / 0.1) - 1
    made = terrain.heights(told.reshape(4, 1, 1, 1)).flatten().float()
    torch.testing.assert_close(made, metres, rtol=1e-5, atol=1e-6)
    assert terrain.heights(torch.full((1, 1, 1, 1), -3.0)).item() == 0  # cut off, as the package does
    assert [terrain.condition(each) for each in (1, 100)] == [0, 1]


def test_roughness_of_a_slope(terrain):
    slope = torch.arange(4.0).repeat(4, 1)[None]
    deviation, neighbours = terrain.roughness(slope)
    assert deviation == pytest.approx(slope.std().item())
    assert neighbours == pytest.approx(0.5)  # 1 across, 0 down


def test_a_second_evaluation_starts_where_it_is_told(terrain):
    model = lambda x, sigma: x  # noqa: E731
    model.sample_shape = terrain.SHAPE
    assert terrain.sampler(model).plan.sigmas == pytest.approx((80, 0.002))
    assert terrain.sampler(model, 60.0).plan.sigmas == pytest.approx((80, 60, 0.002))
