"""The comparison of solvers, on Gaussian data whose ODE has a closed solution."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

import amed_engine
from amed_engine.engine.seeds import draw
from amed_engine.errors import ConfigError
from amed_engine.evaluation import comparison as compare
from amed_engine.evaluation import figure
from amed_engine.evaluation.comparison import CURVE_NFES, TRAINING_FREE, Setting
from amed_engine.networks import EDMPrecond
from amed_engine.solvers import make_solver
from amed_engine.solvers.plan import best_training_free

SCALE = 0.5  # standard deviation of the data


class Gaussian:
    """The exact denoiser of pixels drawn from N(0, SCALE²)."""

    img_channels, img_resolution, sigma_min, sigma_max = 1, 4, 0.002, 80.0

    def __init__(self):
        self.evaluations = 0

    def __call__(self, x, sigma):
        self.evaluations += len(x)
        return x * (SCALE**2 / (SCALE**2 + sigma**2)).view(-1, 1, 1, 1)

    @staticmethod
    def solution(seeds):
        """x(sigma_min) = x(sigma_max) · sqrt((s² + sigma_min²) / (s² + sigma_max²))"""
        noise, _ = draw(seeds, (1, 4, 4), 0)
        return noise.double() * 80 * math.sqrt((SCALE**2 + 0.002**2) / (SCALE**2 + 80**2))


@pytest.fixture(scope="module")
def gaussian():
    return compare.compare(Gaussian(), 5, [3, 1], samples=16, curve_samples=16)


def test_the_reference_is_the_exact_solution(gaussian):
    error = (gaussian.reference.images.double() - Gaussian.solution([3, 1])).abs().max().item()
    assert error < 1e-3
    assert error < 0.02 * gaussian.rows[0].rmse
    assert "NFE 80" in gaussian.reference.plan


def test_rows_are_all_solvers_at_equal_cost_best_first(gaussian):
    assert {row.name for row in gaussian.rows} == set(TRAINING_FREE)
    assert all(row.plan.endswith("NFE 5") for row in gaussian.rows)
    errors = [row.rmse for row in gaussian.rows]
    assert errors == sorted(errors)
    assert all(row.images.shape == (2, 1, 4, 4) for row in gaussian.rows)


@pytest.mark.parametrize("name", ["euler", "heun", "unipc-3"])
def test_rmse_is_the_distance_to_the_exact_solution(gaussian, name):
    seeds = [3, 1, 0, 2, *range(4, 16)]  # those shown, then the smallest other numbers
    solver, options = TRAINING_FREE[name]
    sampler = amed_engine.Sampler(Gaussian(), solver=solver, solver_options=options, nfe=5)
    squares = (sampler.run(seeds).images.double() - Gaussian.solution(seeds)).square().flatten(1).mean(1)
    row = next(row for row in gaussian.rows if row.name == name)
    assert row.rmse == pytest.approx(squares.mean().sqrt().item(), rel=0.02)
    assert row.median == pytest.approx(squares.sqrt().quantile(0.5).item(), rel=0.02)
    assert torch.equal(row.images, sampler.run(seeds).images[:2])


def test_curves_cover_all_solvers_and_agree_with_the_rows(gaussian):
    assert gaussian.curves.keys() == set(TRAINING_FREE)
    assert all(list(points) == list(CURVE_NFES) for points in gaussian.curves.values())
    assert all(points[10] < points[3] for points in gaussian.curves.values())
    for row in gaussian.rows:
        assert gaussian.curves[row.name][5] == pytest.approx(row.rmse, rel=1e-12)


@pytest.mark.parametrize("batch", [1, 3])
def test_errors_do_not_depend_on_the_batch_size(gaussian, batch):
    again = compare.compare(Gaussian(), 5, [3, 1], samples=16, curve_samples=0, setting=Setting(batch=batch))
    assert again.curves == {}
    assert {row.name: row.rmse for row in again.rows} == pytest.approx(
        {r.name: r.rmse for r in gaussian.rows}, rel=1e-4
    )


def test_the_cost_is_what_it_says():
    """Samples times NFE of each solver, and 80 for the reference; nothing is drawn twice."""
    model = Gaussian()
    compare.compare(model, 4, [0], samples=5, curve_samples=2)
    curves = 2 * (sum(CURVE_NFES) - 4)
    assert model.evaluations == 5 * 80 + len(TRAINING_FREE) * (5 * 4 + curves)


def test_json_holds_the_numbers_and_the_table_the_order(gaussian):
    data = gaussian.to_json()
    assert data["rows"][0] == {
        "name": gaussian.rows[0].name,
        "plan": gaussian.rows[0].plan,
        "rmse": gaussian.rows[0].rmse,
        "median": gaussian.rows[0].median,
    }
    assert (data["nfe"], data["seeds"], data["samples"], data["curve_samples"]) == (5, [3, 1], 16, 16)
    assert data["curves"]["euler"][7] == gaussian.curves["euler"][7]
    lines = gaussian.table().splitlines()
    assert lines[0].split() == ["solver", "RMSE", "median", "plan"]
    assert [line.split("  ")[0].strip() for line in lines[1:]] == [row.name for row in gaussian.rows]


def test_the_picture_has_a_row_per_solver_and_a_second_panel(gaussian):
    pytest.importorskip("matplotlib")
    both = Image.open(io.BytesIO(figure.plot(gaussian)))
    without = compare.compare(Gaussian(), 5, [0, 1], samples=2, curve_samples=0)
    alone = Image.open(io.BytesIO(figure.plot(without)))
    assert both.format == alone.format == "PNG"
    assert both.width > 1.5 * alone.width
    assert both.height == alone.height
    assert len(np.unique(np.asarray(both.convert("L")))) > 50


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return EDMPrecond(
        8, 1, label_dim=4, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )


@pytest.fixture(scope="module")
def predictor(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("predictor") / "nfe3.safetensors"
    trained = amed_engine.distill(network, nfe=3, total_kimg=0.016, batch=8, progress=False)
    amed_engine.save_predictor(trained, path)
    return str(path)


def test_a_given_predictor_takes_part_at_its_own_nfe(network, predictor):
    result = compare.compare(network, 3, [0], samples=2, curve_samples=1, predictor=predictor)
    row = next(row for row in result.rows if row.name == "amed")
    assert row.plan == "amed + predictor, time_uniform, 2 intervals, AFS, NFE 3"
    assert list(result.curves["amed"]) == [3]
    drawn = amed_engine.Sampler(network, predictor).run([0, 1]).images
    torch.testing.assert_close(row.images, drawn[:1])


def test_a_schedule_binds_the_training_free_solvers_only(network, predictor):
    setting = Setting(schedule="polynomial", rho=5)
    result = compare.compare(network, 3, [0], samples=1, curve_samples=0, predictor=predictor, setting=setting)
    plans = {row.name: row.plan for row in result.rows}
    assert "polynomial rho=5" in plans["euler"]
    assert "time_uniform" in plans["amed"]


def test_guidance_and_class_reach_every_solver(network):
    setting = Setting(class_labels=2, guidance_scale=3.0)
    result = compare.compare(network, 3, [0], samples=1, curve_samples=0, setting=setting)
    expected = amed_engine.Sampler(network, solver="euler", nfe=3).run([0], class_labels=2, guidance_scale=3.0).images
    row = next(row for row in result.rows if row.name == "euler")
    assert torch.equal(row.images, expected)


def test_a_predictor_for_another_nfe_is_refused(network, predictor):
    with pytest.raises(ConfigError, match="trained for nfe=3, got nfe=5"):
        compare.compare(network, 5, [0], samples=1, predictor=predictor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": range(33)}, "at most 32, got 33"),
        ({"seeds": []}, "got no seeds"),
        ({"samples": 0}, "at least 1, .* got 0"),
        ({"curve_samples": -1}, "got .* -1"),
        ({"setting": Setting(batch=0)}, "at least 1"),
        ({"nfe": 0}, "nfe must be a positive integer, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        compare.compare(Gaussian(), **{"seeds": [0], "samples": 1, "curve_samples": 0, **arguments})


def test_the_bundled_predictor_beats_what_would_run_without_it():
    """On the bundled model at 5 evaluations; the curve has a point for each of its predictors."""
    result = compare.compare("digits", 5, [0], samples=16, curve_samples=1)
    learned = next(row for row in result.rows if "+ predictor" in row.plan)
    plan = best_training_free(5)
    name = next(
        name for name, entry in TRAINING_FREE.items() if make_solver(entry[0], **entry[1]) == plan.make_solver()
    )
    assert learned.rmse < next(row.rmse for row in result.rows if row.name == name)
    learned_curves = [curve for name, curve in result.curves.items() if name == "nonstationary"]
    assert sorted(nfe for curve in learned_curves for nfe in curve) == [3, 4, 5, 6, 7, 8, 9, 10]


# ---- ranges of noise levels


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A predictor that is right, from 14 to 0.02 where the model goes from 80 to 0.002."""
    path = tmp_path_factory.mktemp("short") / "nfe5.safetensors"
    fitted = amed_engine.fit(
        Gaussian(), sigma_max=14.0, sigma_min=0.02, samples=32, batch=32, starts=1, early=2, late=2, progress=False
    )
    amed_engine.save_predictor(fitted, path)
    return str(path)


def ranges(result) -> dict:
    return {row.name: tuple(row.range) for row in result.rows}


def test_a_right_predictor_of_another_range_is_first(short):
    result = compare.compare(Gaussian(), 5, [0], samples=16, curve_samples=2, predictor=short)
    assert result.rows[0].name == "nonstationary"
    assert result.rows[0].rmse < 0.01
    assert set(ranges(result).values()) == {(14.0, 0.02)}  # the others do the same task
    assert tuple(result.reference.range) == (14.0, 0.02)
    noise, _ = draw([0], (1, 4, 4), 0)
    exact = noise.double() * 14 * math.sqrt((SCALE**2 + 0.02**2) / (SCALE**2 + 14**2))
    torch.testing.assert_close(result.reference.images.double(), exact, atol=1e-3, rtol=0)


def test_a_predictor_keeps_its_range_where_another_is_asked_for(short):
    setting = Setting(sigma_max=40.0)
    result = compare.compare(Gaussian(), 5, [0], samples=16, curve_samples=0, predictor=short, setting=setting)
    found = ranges(result)
    assert found.pop("nonstationary") == (14.0, 0.02)
    assert set(found.values()) == {(40.0, 0.02)}
    assert result.rows[0].name == "nonstationary"
    assert (
        result.table()
        .splitlines()[-1]
        .startswith("Ranges differ: each row is measured against the solution of its own")
    )
    assert "sigma 14 to 0.02" in next(line for line in result.table().splitlines() if line.startswith("nonstationary"))
    assert result.to_json()["ranges"]["euler"] == {"sigma_max": 40.0, "sigma_min": 0.02}


def test_levels_are_measured_against_a_solution_of_their_range():
    setting = Setting(schedule=torch.tensor([20.0, 8.0, 2.0, 0.5, 0.1]))
    result = compare.compare(Gaussian(), 4, [0], samples=4, curve_samples=0, setting=setting)
    assert set(ranges(result).values()) == {(20.0, 0.1)}
    assert result.rows[0].rmse < 0.05
    with pytest.raises(ConfigError, match="their own range, got sigma_max=40 as well"):
        compare.compare(Gaussian(), 4, [0], samples=4, setting=Setting(schedule=setting.schedule, sigma_max=40.0))


def test_a_range_binds_the_training_free_solvers(gaussian):
    setting = Setting(sigma_min=0.1, sigma_max=5.0)
    result = compare.compare(Gaussian(), 5, [3, 1], samples=4, curve_samples=0, setting=setting)
    assert set(ranges(result).values()) == {(5.0, 0.1)}
    assert set(ranges(gaussian).values()) == {(80.0, 0.002)}
    sampler = amed_engine.Sampler(Gaussian(), solver="euler", nfe=5, sigma_min=0.1, sigma_max=5.0)
    row = next(row for row in result.rows if row.name == "euler")
    assert torch.equal(row.images, sampler.run([3, 1]).images)
