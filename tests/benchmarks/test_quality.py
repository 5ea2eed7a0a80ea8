"""The quality benchmark: rows that are what an evaluation by hand gives, in pieces or at once."""

import io
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tqdm import tqdm

import amed_engine
from amed_engine.checkpoints import save_model
from amed_engine.errors import ConfigError
from amed_engine.evaluation.comparison import REFERENCE, Setting
from amed_engine.evaluation.metrics import frechet, per_image_rmse
from amed_engine.networks import EDMPrecond

pytest.importorskip("sklearn")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_quality
    import quality

    # Any solution will do as reference, and pictures take their time: one test draws one.
    monkeypatch.setattr(quality, "REFERENCE", {**REFERENCE, "nfe": 12})
    monkeypatch.setattr(bench_quality, "draw", bench_quality.plot, raising=False)
    monkeypatch.setattr(bench_quality, "plot", lambda data: b"")
    yield bench_quality
    # The modules of benchmarks/ have everyday names; leave none behind.
    for name in ("harness", "quality", "bench_quality"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small conditional network of digits, with random weights, and a predictor for it at NFE 3."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    small = {
        "model_type": "SongUNet",
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    network = EDMPrecond(8, 1, label_dim=10, sigma_min=0.002, sigma_max=80.0, **small)
    save_model(network, folder / "tiny.safetensors")
    trained = amed_engine.distill(network, nfe=3, total_kimg=0.016, batch=8, progress=False)
    amed_engine.save_predictor(trained, folder / "p.safetensors")
    return folder / "tiny.safetensors"


def run(bench, out, model, *args):
    command = ["--network", str(model), "--samples", "16", "--out", str(out), *args]
    with mock.patch.object(sys, "argv", ["bench_quality.py", *command]):  # results name the command that made them
        done = CliRunner().invoke(bench.main, command)
    return done.exit_code, done.output


def rows_of(out):
    data = json.loads((out / "quality-tiny.json").read_text())
    return data, {(row["solver"], row["nfe"], row["schedule"], row["afs"]): row for row in data["rows"]}


def test_a_row_is_what_an_evaluation_by_hand_gives(bench, model, tmp_path):
    schedules = ("time_uniform", "polynomial")
    chosen = ("--only", "euler", "--only", "heun", *(f"--schedule={name}" for name in schedules))
    code, text = run(bench, tmp_path, model, "--nfe", "3-4", *chosen)
    assert code == 0, text
    data, rows = rows_of(tmp_path)
    # Heun spends two per interval: 3 with an analytic step, 4 without.
    euler = {("euler", nfe, schedule, afs) for nfe in (3, 4) for schedule in schedules for afs in ("mean", True, False)}
    heun = {("heun", nfe, s, afs) for nfe, afs in ((3, "mean"), (3, True), (4, False)) for s in schedules}
    assert rows.keys() == euler | heun
    plan = {"solver": "euler", "nfe": 3, "schedule": "polynomial", "afs": False}
    images = amed_engine.Sampler(str(model), **plan).run(range(16)).images
    truth = amed_engine.Sampler(str(model), **{**REFERENCE, "nfe": 12}).run(range(16)).images
    row = rows["euler", 3, "polynomial", False]
    errors = per_image_rmse(images, truth)
    assert row["rmse"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-3)
    assert row["median"] == pytest.approx(errors.quantile(0.5).item(), rel=1e-3)
    assert row["fd_reference_pixels"] == pytest.approx(frechet(images, truth, "pixels"), rel=1e-3)
    assert (data["samples"], data["seeds"], len(data["runs"])) == (16, "0-15", 1)
    assert {"command", "commit", "torch", "gpu"} <= data["runs"][0].keys()


def test_pieces_make_the_whole(bench, model, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    plan = ("--schedule", "logsnr", "--only", "euler", "--only", "ipndm-2")
    run(bench, one, model, *plan, "--nfe", "3,5")
    for piece in (("--nfe", "5"), ("--nfe", "3"), ("--nfe", "5")):
        run(bench, two, model, *plan, *piece)
    (_, whole), (data, pieces) = rows_of(one), rows_of(two)
    without = [
        {key: {n: v for n, v in row.items() if n != "run"} for key, row in rows.items()} for rows in (whole, pieces)
    ]
    assert without[0] == without[1]
    assert len(data["runs"]) == 2  # the first has no row left
    assert (two / "quality-tiny.png").exists()


def test_the_best_of_each_solver_is_shown(bench, model, tmp_path):
    _, text = run(bench, tmp_path, model, "--nfe", "3", "--only", "euler")
    _, rows = rows_of(tmp_path)
    first = min(rows.values(), key=lambda row: row["rmse"])
    assert text.splitlines()[-1] == f"| euler | {first['rmse']:.4f} / {first['fd_reference_pixels']:.3f} |"
    assert bench.best(rows.values())["euler"][3]["rmse"] == first["rmse"]


def test_the_picture_has_a_panel_per_measure(bench):
    pytest.importorskip("matplotlib")
    measures = dict.fromkeys(bench.PANELS, 0.5)
    rows = [{"solver": solver, "nfe": nfe, **measures} for solver in ("euler", "mine") for nfe in (3, 5)]
    picture = Image.open(io.BytesIO(bench.draw({"network": "n", "samples": 8, "rows": rows})))
    assert picture.format == "PNG"
    assert picture.width > 2.5 * picture.height


def test_predictors_take_part_under_their_name(bench, model, tmp_path):
    path = model.with_name("p.safetensors")
    args = ("--only", "mine", "--only", "amed", "--predictor", f"mine={path}", "--predictor", str(path))
    assert run(bench, tmp_path, model, "--nfe", "3-5", *args)[0] == 0
    data, _ = rows_of(tmp_path)
    assert [(row["solver"], row["nfe"], row["learned"]) for row in data["rows"]] == [
        ("mine", 3, True),
        ("amed", 3, True),
    ]
    assert data["rows"][0]["rmse"] == data["rows"][1]["rmse"]


def test_results_of_other_samples_are_not_mixed(bench, model, tmp_path):
    args = ("--nfe", "3", "--only", "euler", "--schedule", "logsnr")
    run(bench, tmp_path, model, *args)
    code, text = run(bench, tmp_path, model, *args, "--samples", "8")
    assert code == 1
    assert "samples=16, this run of 8" in text
    code, text = run(bench, tmp_path, model, "--nfe", "3", "--only", "rk4")
    assert code == 1
    assert "nothing was measured" in text


def test_an_absent_network_is_skipped(bench, tmp_path, monkeypatch):
    import quality

    monkeypatch.setattr(quality, "REFERENCE_DIGITS", tmp_path / "none.safetensors")
    done = CliRunner().invoke(bench.main, ["--network", "reference_digits", "--out", str(tmp_path)])
    assert done.exit_code == 0
    assert done.output.startswith("skipped: reference_digits is not at")
    assert list(tmp_path.iterdir()) == []


def test_the_published_implementation_s_row_is_reproduced(bench, goldens_dir):
    """iPNDM-2, AFS, time_uniform, 7 levels: recorded over 512 samples as RMSE 0.1063, here within three standard errors of
    the mean squared error over the first 96; the fine reference is 0.327 from the data by pixels."""
    import quality

    with tqdm(disable=True) as bar:
        yard = quality.yardstick("reference_digits", 96, Setting(batch=96), bar)
        plan = {"schedules": ("time_uniform",), "only": ("ipndm-2",), "predictors": ()}
        name, sampler = next(quality.samplers(yard, nfes=[5], **plan))
        images = yard.setting.images(sampler, yard.start, bar)
        row = quality.measure(yard, name, sampler, bar)
    assert sampler.plan.describe() == "ipndm max_order=2, time_uniform, 6 intervals, AFS, NFE 5"
    squared = per_image_rmse(images, yard.truth).square()
    assert row["rmse"] ** 2 == pytest.approx(squared.mean().item(), rel=1e-4)
    assert abs(squared.mean() - 0.1063**2) < 3 * squared.std() / 96**0.5


def test_recorded_frechet_distance_of_the_fine_reference(bench, goldens_dir):
    import quality

    with tqdm(disable=True) as bar:
        yard = quality.yardstick("reference_digits", 512, Setting(), bar)
    _, truth, data = yard.known["pixels"]
    assert truth.features.shape == torch.Size([512, 64])
    assert quality.frechet_distance(truth.statistics, data.statistics) == pytest.approx(0.327, abs=5e-4)
    with pytest.raises(ConfigError, match="has 512 latents, got samples=513"):
        quality.yardstick("reference_digits", 513, Setting(), tqdm(disable=True))
