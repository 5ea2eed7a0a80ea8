"""Evaluation of a sampler, on Gaussian data whose ODE has a closed solution, and through the command line."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import amed_engine
from amed_engine.engine.images import save_each, to_uint8
from amed_engine.engine.seeds import draw
from amed_engine.errors import AmedError, ConfigError
from amed_engine.evaluation import quality as evaluation
from amed_engine.evaluation.comparison import REFERENCES, Setting
from amed_engine.evaluation.metrics import (
    Statistics,
    class_accuracy,
    frechet_distance,
    per_image_rmse,
    precision_recall,
)

SEEDS = range(5, 45)
MEAN, SD = 0.25, 0.5


def sampler_of(denoiser, **plan):
    return amed_engine.Sampler(denoiser, shape=(1, 4, 4), **plan)


@pytest.fixture
def euler(gaussian_denoiser):
    return sampler_of(gaussian_denoiser, solver="euler", nfe=4)


def solution(seeds):
    """x(sigma_min) - mean = (80 noise - mean) sqrt((sd² + sigma_min²) / (sd² + 80²))"""
    noise, _ = draw(seeds, (1, 4, 4), 0)
    return MEAN + (80 * noise.double() - MEAN) * math.sqrt((SD**2 + 0.002**2) / (SD**2 + 80**2))


def test_distance_is_that_to_the_exact_solution(euler):
    found = evaluation.evaluate(euler, SEEDS, reference="deis-fine")
    errors = per_image_rmse(euler.run(SEEDS).images, solution(SEEDS))
    assert found.distance.rmse == pytest.approx(errors.square().mean().sqrt().item(), rel=0.02)
    assert found.distance.median == pytest.approx(errors.quantile(0.5).item(), rel=0.02)
    assert (found.nfe, found.samples, found.to_data, found.class_accuracy) == (4, 40, None, None)


def test_sets_are_compared_by_their_features(euler):
    real = 0.5 * torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.25
    found = evaluation.evaluate(euler, SEEDS, data=real, setting=Setting(batch=7))
    images, exact = euler.run(SEEDS).images.flatten(1), solution(SEEDS).flatten(1)
    for other, got in ((exact, found.to_reference), (real.flatten(1), found.to_data)):
        distance = frechet_distance(Statistics().update(images), Statistics().update(other))
        assert got.frechet == pytest.approx(distance, rel=0.01)
        assert (got.precision, got.recall) == pytest.approx(precision_recall(images, other), abs=0.03)
    assert found.statistics.count == 40


def test_files_serve_as_reference_and_data(euler, tmp_path):
    images = euler.run(SEEDS).images
    save_each(tmp_path / "folder", list(to_uint8(images)), SEEDS)
    Statistics().update(images.flatten(1)).save(tmp_path / "s.npz")
    found = evaluation.evaluate(euler, SEEDS, reference=str(tmp_path / "s.npz"), data=str(tmp_path / "folder"))
    assert found.distance is None
    assert found.to_reference.frechet == pytest.approx(0, abs=1e-9)
    assert found.to_reference.precision is None
    assert found.to_data.frechet < 1e-3
    assert found.to_data.precision > 0.9


def test_the_reference_has_the_sampler_s_noise_levels_and_labels(tiny_conditional):
    sampler = amed_engine.Sampler(tiny_conditional, solver="euler", nfe=3, sigma_min=0.01, sigma_max=20.0)
    setting = Setting(class_labels=4, guidance_scale=2.0)
    found = evaluation.evaluate(sampler, range(4), reference="heun-fine", setting=setting)
    heun = amed_engine.Sampler(tiny_conditional, sigma_min=0.01, sigma_max=20.0, **REFERENCES["heun-fine"])
    truth, images = (each.run(range(4), 4, 2.0).images for each in (heun, sampler))
    assert found.distance.rmse == pytest.approx(per_image_rmse(images, truth).square().mean().sqrt().item(), rel=1e-4)


def test_samples_of_one_class_are_compared_with_data_of_that_class(tiny_conditional, caplog, tmp_path):
    """Against scikit-learn's images of that label; data without labels are taken as they are, and that is said."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    threes = torch.tensor(pixels[labels == 3]).float() / 8 - 1
    sampler = amed_engine.Sampler(tiny_conditional, solver="euler", nfe=3)
    setting = Setting(class_labels=3)
    found = evaluation.evaluate(sampler, range(8), data="digits", setting=setting)
    images = sampler.run(range(8), 3).images.flatten(1)
    expected = frechet_distance(Statistics().update(images), Statistics().update(threes))
    assert found.to_data.frechet == pytest.approx(expected, rel=1e-6)
    assert not caplog.records
    unlabelled = evaluation.evaluate(sampler, range(8), data=threes.reshape(-1, 1, 8, 8), setting=setting)
    assert unlabelled.to_data.frechet == pytest.approx(expected, rel=1e-6)
    assert "samples are of class 3; data given have no labels" in caplog.text
    Statistics().update(threes).save(tmp_path / "s.npz")
    caplog.clear()
    evaluation.evaluate(sampler, range(8), reference=str(tmp_path / "s.npz"), setting=setting)
    assert "s.npz have no labels and are taken as they are" in caplog.text


def test_class_accuracy_is_of_the_classes_drawn(tiny_conditional):
    sampler = amed_engine.Sampler(tiny_conditional, solver="euler", nfe=3)
    found = evaluation.evaluate(
        sampler, range(20), reference="deis-fine", classifier="digits", setting=Setting(batch=6)
    )
    result = sampler.run(range(20))
    assert found.class_accuracy == pytest.approx(class_accuracy(result.images, result.labels))


def test_bad_arguments_are_named(euler, monkeypatch):
    with pytest.raises(ConfigError, match="seeds are empty"):
        evaluation.evaluate(euler, [])
    with pytest.raises(ConfigError, match="takes a Sampler, got str"):
        evaluation.evaluate("digits", SEEDS)
    with pytest.raises(ConfigError, match="neither deis-fine, heun-fine nor a folder"):
        evaluation.evaluate(euler, SEEDS, reference="heun")
    with pytest.raises(ConfigError, match=r"10 classes.*'digits' and 0"):
        evaluation.evaluate(euler, SEEDS, classifier="digits")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(AmedError, match=r"pip install 'amed-engine\[zoo\]'"):
        evaluation.evaluate(euler, SEEDS, data="digits")


# ---- the command


def test_the_bundled_model_is_evaluated_with_all_there_is(amed, tmp_path):
    pytest.importorskip("sklearn")
    file = tmp_path / "new" / "out.json"
    args = ("--seeds", "0-15", "--nfe", 5, "--reference", "heun-fine", "--features", "digits", "--device", "cpu")
    code, out, err = amed("evaluate", "--model", "digits", *args, "--json", file)
    assert (code, err) == (0, "")
    found = json.loads(file.read_text())
    assert 0.005 < found["distance"]["rmse"] < 0.06
    assert found["class_accuracy"] > 0.9
    assert found["to_data"]["precision"] > 0.8
    assert "+ predictor" in found["plan"]
    assert f"RMSE {found['distance']['rmse']:.4f}" in out
    assert re.search(r"^class accuracy \d\.\d{4}$", out, re.MULTILINE)


def test_statistics_of_one_run_are_the_reference_of_another(amed, tmp_path):
    file = tmp_path / "s.npz"
    args = ("evaluate", "--seeds", "0-15", "--nfe", 3, "--data", "none", "--classifier", "none", "--device", "cpu")
    plan = ("--solver", "ipndm", "--solver-option", "max_order=2", "--predictor", "none")
    (tmp_path / "empty.npz").touch()
    assert amed(*args, *plan, "--reference", tmp_path / "empty.npz")[0] == 1
    np.savez(file, mu=np.zeros(64), sigma=np.eye(64))
    assert amed(*args, *plan, "--reference", file, "--save-statistics", file)[0] == 0
    code, out, _ = amed(*args, *plan, "--reference", file, "--json", "-")
    found = json.loads(out)
    assert code == 0
    assert found["to_reference"]["frechet"] == pytest.approx(0, abs=1e-9)
    assert (found["distance"], found["to_data"], found["class_accuracy"]) == (None, None, None)
    assert (
        found["plan"]
        == "ipndm max_order=2, time_uniform, 4 intervals, AFS about the mean of 32 latents and class, NFE 3"
    )


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--reference", "none.npz"), 2, "neither deis-fine"),
        (("--features", "vgg"), 2, "valid names: pixels"),
        (("--save-statistics", "a.npy"), 2, r"saved as \.npz"),
        (("--solver-option", "max_order"), 2, "not name=value"),
        (("--data", "{file}"), 1, "is not a folder"),
        (("--json", "{file}/a.json"), 1, "{file}"),
    ],
)
def test_bad_usage_is_one_line(args, code, message, amed, tmp_path):
    file = tmp_path / "file"
    file.touch()
    got, out, err = amed("evaluate", *(arg.format(file=file) for arg in args))
    assert (got, out) == (code, "")
    assert re.fullmatch(rf"amed: error: .*{message.format(file=file)}.*\n", err)


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom amed_engine import cli\n"
        "try: cli.main(['evaluate', '--help'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: amed evaluate ")
