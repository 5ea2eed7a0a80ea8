"""The command line: what it writes, what it prints, and how it fails."""

import json
import logging
import math
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image

import amed_engine
from amed_engine import cli, kernels, zoo
from amed_engine.checkpoints import load_predictor, save_model, save_predictor
from amed_engine.engine import sampler
from amed_engine.networks import EDMPrecond
from amed_engine.solvers import SOLVERS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small class-conditional network with random weights."""
    torch.manual_seed(0)
    network = EDMPrecond(
        8, 1, label_dim=4, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )
    for parameter in network.parameters():  # some start at zero, and then the output ignores the label
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(network, path)
    return path


@pytest.fixture(scope="module")
def predictor(model) -> Path:
    """A predictor for it, trained for 3 evaluations on 16 trajectories."""
    path = model.with_name("nfe3.safetensors")
    trained = amed_engine.distill(str(model), nfe=3, total_kimg=0.016, batch=8, progress=False)
    save_predictor(trained, path)
    return path


def rounded(images: torch.Tensor) -> np.ndarray:
    """EDM's rule, one pixel after the other, as (B, H, W)."""
    pixels = [min(max(math.floor(x * 127.5 + 128), 0), 255) for x in images.flatten().tolist()]
    return np.array(pixels, dtype=np.uint8).reshape(len(images), *images.shape[2:])


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ---- start-up ----


@pytest.mark.parametrize("command", [[], *([name] for name in cli.app.commands)])
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys\nfrom amed_engine import cli\n"
        f"try: cli.main({[*command, '--help']!r})\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'matplotlib', 'tqdm', 'triton', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {' '.join(['amed', *command])} ")


def test_it_is_the_module_and_the_script():
    done = subprocess.run(
        [sys.executable, "-m", "amed_engine", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"amed, version {amed_engine.__version__}\n"
    (script,) = [entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "amed"]
    assert script.load() is cli.main


def test_help_names_the_solvers_there_are():
    (option,) = [option for option in cli.app.commands["sample"].params if option.name == "solver"]
    assert isinstance(option, click.Option)
    named = re.findall(r"\w+", option.help.replace(" or ", " "))
    assert set(named) == set(SOLVERS) - {"amed", "nonstationary"}


# ---- sample ----


def test_one_png_per_seed_holds_the_sampler_s_image(amed, model, tmp_path):
    code, out, err = amed(
        "sample", "--model", model, "--seeds", "7,0-1", "--nfe", 4, "--outdir", tmp_path / "new" / "o"
    )
    assert (code, err.count("\n")) == (0, 1)  # the line about training-free sampling
    files = sorted((tmp_path / "new" / "o").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000007.png"]
    expected = rounded(amed_engine.Sampler(str(model), nfe=4).run([0, 1, 7]).images)
    assert np.abs(np.stack([read(file) for file in files]).astype(int) - expected).max() <= 1
    assert "NFE 4" in out
    assert re.search(r"^3 images, NFE 4, \d+\.\d\d s, \d+\.\d images/s$", out, re.MULTILINE)
    assert re.search(r"^backend \w+ on (cpu|cuda)", out, re.MULTILINE)


def test_subdirs_are_those_of_edm(amed, model, tmp_path):
    amed("sample", "--model", model, "--seeds", "999-1000", "--nfe", 3, "--outdir", tmp_path, "--subdirs")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == ["000000/000999.png", "001000/001000.png"]


def test_class_and_guidance_reach_the_model(amed, model, tmp_path):
    args = ("--model", model, "--seeds", "5", "--nfe", 3, "--class", 2, "--guidance", 30.0, "--device", "cpu")
    assert amed("sample", *args, "--outdir", tmp_path)[0] == 0
    sampler = amed_engine.Sampler(str(model), nfe=3)
    expected = rounded(sampler.run([5], class_labels=2, guidance_scale=30.0).images)[0]
    assert np.array_equal(read(tmp_path / "000005.png"), expected)
    assert not np.array_equal(expected, rounded(sampler.run([5], class_labels=1, guidance_scale=30.0).images)[0])


def test_the_grid_holds_all_seeds_whatever_the_batch(amed, model, tmp_path):
    for batch in (2, 64):
        args = ("--model", model, "--seeds", "0-4", "--nfe", 3, "--batch", batch)
        assert amed("sample", *args, "--out", tmp_path / f"{batch}.png")[0] == 0
    pieces, whole = read(tmp_path / "2.png"), read(tmp_path / "64.png")
    assert whole.shape == (2 * 68 + 4, 3 * 68 + 4)  # 3 columns, 64 pixels each, 4 between
    assert np.abs(pieces.astype(int) - whole).max() <= 1


def test_the_plan_is_what_was_asked_for(amed, model, tmp_path):
    options = ("--solver", "dpmpp", "--solver-option", "max_order=2", "--solver-option", "predict_x0=False")
    schedule = ("--schedule", "polynomial", "--rho", 5, "--no-afs", "--dtype", "float64")
    out = tmp_path / "s.png"
    code, text, err = amed("sample", "--network", model, "--seeds", 0, "--nfe", 4, *options, *schedule, "--out", out)
    assert (code, err) == (0, "")
    assert (
        text.splitlines()[0]
        == "dpmpp max_order=2 predict_x0=False thresholding=False, polynomial rho=5, 4 intervals, NFE 4"
    )
    assert text.splitlines()[-1] == f"wrote {out}"


def test_a_predictor_decides_the_plan(amed, model, predictor, tmp_path):
    args = ("sample", "--model", model, "--seeds", "0-1", "--outdir", tmp_path)
    code, out, err = amed(*args, "--predictor_path", predictor)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "amed + predictor, time_uniform, 2 intervals, AFS, NFE 3"
    expected = rounded(amed_engine.Sampler(str(model), str(predictor)).run([0, 1]).images)
    assert np.abs(read(tmp_path / "000001.png").astype(int) - expected[1]).max() <= 1


def test_training_free_sampling_is_said_once_and_in_one_line(amed, model, tmp_path):
    args = ("--model", model, "--seeds", "0-3", "--batch", 1, "--nfe", 3)
    _, _, err = amed("sample", *args, "--out", tmp_path / "s.png")
    assert re.fullmatch(r"amed: warning: no predictor .* NFE 3.*\n", err)
    _, out, err = amed("sample", *args, "--predictor", "none", "--out", tmp_path / "s.png")
    assert err == ""
    assert out.startswith("deis max_order=3, polynomial, 3 intervals, NFE 3")


def test_the_log_is_left_as_it_was(amed):
    logger = logging.getLogger("amed_engine")
    before = list(logger.handlers)
    amed("info")
    assert logger.handlers == before


# ---- compare ----


def test_compare_writes_picture_and_numbers(amed, model, tmp_path):
    pytest.importorskip("matplotlib")
    png, numbers = tmp_path / "c.png", tmp_path / "c.json"
    small = ("--samples", 3, "--curve-samples", 1, "--seeds", "0-1", "--nfe", 4)
    code, out, err = amed("compare", "--model", model, *small, "--out", png, "--json", numbers)
    assert (code, err) == (0, "")
    assert Image.open(png).format == "PNG"
    data = json.loads(numbers.read_text())
    assert (data["nfe"], data["samples"], data["seeds"]) == (4, 3, [0, 1])
    lines = [line.split("  ") for line in out.splitlines()[1:]]
    assert [line[0].strip() for line in lines] == [row["name"] for row in data["rows"]]
    assert sorted(data["curves"]["euler"], key=int) == [str(n) for n in range(3, 11)]


def test_compare_prints_json_on_request(amed, model, predictor):
    small = ("--samples", 1, "--curve-samples", 0, "--seeds", "4", "--nfe", 3, "--predictor", predictor)
    code, out, _ = amed("compare", "--model", model, *small, "--json", "-")
    assert code == 0
    assert "amed" in {row["name"] for row in json.loads(out)["rows"]}


def test_compare_says_what_to_install_before_it_computes(amed, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("amed_engine.evaluation.comparison.compare", lambda *_, **__: pytest.fail("computed first"))
    code, _, err = amed("compare", "--model", model, "--out", tmp_path / "c.png")
    assert code == 1
    assert "pip install 'amed-engine[plot]'" in err


# ---- info ----


def test_info_tells_versions_devices_kernels_and_models(amed):
    code, out, err = amed("info", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert facts["versions"]["python"] == sys.version.split()[0]
    assert facts["kernels"].keys() == {"cpu", "cuda", "extension", "cuda_c++", "libamed"}
    built = (Path(kernels.__file__).parent / "amed_cuda.so").exists()
    assert built == facts["kernels"]["cuda_c++"].startswith("amed_cuda.so, ")
    assert facts["kernels"]["libamed"].startswith("active, with") or "not built" in facts["kernels"]["libamed"]
    assert (facts["kernels"]["extension"] == "active") == (facts["kernels"]["cpu"] == "native")
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()
    assert facts["predictors"].keys() == set(zoo.names())


def test_info_is_the_same_for_people(amed):
    facts, text = json.loads(amed("info", "--json")[1]), amed("info")[1]
    for section, entries in facts.items():
        assert section in text.splitlines()
        assert all(re.search(rf"^  {re.escape(name)} ", text, re.MULTILINE) for name in entries)


# ---- distill ----


def test_distill_saves_a_predictor_that_sampling_takes(amed, model, tmp_path):
    path = tmp_path / "new" / "p.safetensors"
    tiny = ("--kimg", 0.016, "--batch", 8, "--seed", 3)
    student = ("--solver", "ipndm", "--solver-option", "max_order=2", "--nfe", 5, "--scale-time", 0.1)
    code, out, err = amed("distill", "--model", model, *tiny, *student, "--out", path)
    assert (code, err) == (0, "")
    trained = load_predictor(path)
    assert trained.plan.describe() == out.splitlines()[0]
    assert (trained.plan.solver, trained.plan.nfe, dict(trained.plan.options)) == ("ipndm", 5, {"max_order": 2})
    assert (trained.scale_dir, trained.scale_time) == (0.01, 0.1)
    losses = re.search(r"^final loss per interval: (.*)$", out, re.MULTILINE)[1].split()
    assert len(losses) == trained.plan.intervals
    assert all(0 < float(loss) < math.inf for loss in losses)
    assert amed("sample", "--model", model, "--seeds", 0, "--predictor", path, "--outdir", tmp_path)[0] == 0


def test_distill_leaves_a_folder_to_look_at_and_to_resume_from(amed, model, tmp_path):
    run = (
        "distill",
        "--model",
        model,
        "--nfe",
        3,
        "--kimg",
        0.016,
        "--batch",
        8,
        "--preset",
        "amed-plugin",
        "--accumulate",
        2,
    )
    run += (
        "--objective",
        "end_to_end",
        "--scales",
        "wide",
        "--out-dir",
        tmp_path / "run",
        "--out",
        tmp_path / "p.safetensors",
    )
    code, out, err = amed(*run)
    assert (code, err) == (0, "")
    assert out.startswith("ipndm max_order=4 + predictor, polynomial rho=7")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"history.csv", "history.png", "checkpoints"}
    before = (tmp_path / "p.safetensors").read_bytes()
    code, again, _ = amed(*run)
    assert code == 0
    assert "final loss" in out
    assert "final loss" not in again
    assert (tmp_path / "p.safetensors").read_bytes() == before


def test_distill_finds_out_that_it_cannot_save_before_it_trains(amed, model, tmp_path, monkeypatch):
    monkeypatch.setattr(amed_engine, "distill", lambda *_, **__: pytest.fail("trained first"))
    (tmp_path / "file").touch()
    code, _, err = amed("distill", "--model", model, "--out", tmp_path / "file" / "p.safetensors")
    assert code == 1
    assert re.fullmatch(r"amed: error: cannot write to folder .*file: .*; choose another\n", err)


# ---- fit ----


def test_fit_writes_a_predictor_per_number_of_evaluations(amed, tiny_model, tmp_path):
    save_model(tiny_model, tmp_path / "m.safetensors")
    options = ("--samples", 8, "--early", 0, "--late", 1, "--teacher-nfe", 4, "--starts", 1)
    code, out, err = amed(
        "fit", "--model", tmp_path / "m.safetensors", "--nfe", "2-3", *options, "--out", tmp_path / "out"
    )
    assert code == 0, out + err
    for nfe in (2, 3):
        predictor = load_predictor(tmp_path / "out" / f"nfe{nfe}.safetensors")
        assert predictor.plan.nfe == nfe
        assert amed_engine.Sampler(tiny_model, predictor).run(1).images.isfinite().all()
    told = re.findall(r"^RMSE [\d.]+, median [\d.]+, on the 8 latents of the fit, [\d.]+ of the", out, re.MULTILINE)
    assert len(told) == 2


# ---- calibrate ----


def test_calibrate_writes_a_recipe_that_sample_takes(amed, model, tmp_path):
    where = ("--model", model, "--device", "cpu")
    recipe = tmp_path / "new" / "recipe.json"
    code, out, err = amed(
        "calibrate", *where, "--nfe", 2, "--guidance", 2.0, "--class", 1, "--rows", 2, "--out", recipe
    )
    assert (code, err) == (0, "")
    found = amed_engine.calibrate(
        str(model), 2, conditions=[torch.ones(64, dtype=torch.int64)], guidance_scale=2.0, progress=False
    )
    assert amed_engine.Plan.load(recipe) == found.plan
    assert out == f"{found.table(rows=2)}\n{found.plan.describe()}: wrote {recipe}\n"
    asked = ("--plan", recipe, "--seeds", 3, "--class", 1, "--guidance", 2.0, "--out", tmp_path / "a.png")
    code, _, err = amed("sample", *where, *asked)
    assert code == 0, err


def test_calibrate_writes_a_folder_for_several_numbers_of_evaluations(amed, model, tmp_path):
    code, out, err = amed("calibrate", "--model", model, "--nfe", "1-2", "--device", "cpu", "--out", tmp_path / "o")
    assert code == 0, out + err
    plans = {path.name: amed_engine.Plan.load(path).nfe for path in (tmp_path / "o").iterdir()}
    assert plans == {"nfe1.json": 1, "nfe2.json": 2}


# ---- failure ----

USAGE = {
    "no command": ((), "Missing command"),
    "an unknown command": (("smaple",), "smaple"),
    "an unknown option": (("sample", "--nef", "5"), "--nef"),
    "no place to write": (("sample",), "pass --out FILE.png or --outdir"),
    "subdirs of nothing": (("sample", "--subdirs", "--out", "a.png"), "--subdirs needs --outdir"),
    "a picture of another kind": (("sample", "--out", "a.jpg"), "written as PNG, got a.jpg; name it a.png"),
    "a comparison of another kind": (("compare", "--out", "c.pdf"), "written as PNG, got c.pdf"),
    "several fits in one file": (("fit", "--nfe", "3-4", "--out", "p.safetensors"), "pass --out FOLDER"),
    "several recipes in one file": (("calibrate", "--nfe", "3-4", "--out", "r.json"), "pass --out FOLDER, not r.json"),
    "a calibration of no NFE": (("calibrate", "--nfe", "0", "--out", "r.json"), "from 1 to 16, got 0"),
    "an NFE that is none": (("fit", "--nfe", "x", "--out", "p.safetensors"), "cannot read NFE 'x'"),
    "a predictor for no evaluation": (
        ("sample", "--nfe", "0", "--out", "a.png"),
        "nfe must be a positive integer, got 0",
    ),
    "an option without value": (("sample", "--solver-option", "max_order", "--out", "a.png"), "not name=value"),
    "an option of the wrong type": (("sample", "--nfe", "five", "--out", "a.png"), "not a valid integer"),
    "a batch of nothing": (("sample", "--batch", "0", "--out", "a.png"), "x>=1"),
    "distill without out": (("distill",), "--out"),
    "unreadable seeds": (
        ("sample", "--model", "{model}", "--seeds", "1-x", "--out", "a.png"),
        "cannot read seeds '1-x'",
    ),
    "an unknown model": (("sample", "--model", "nothing", "--out", "a.png"), "unknown model 'nothing'.*bundled models"),
    "no evaluations": (("sample", "--model", "{model}", "--nfe", "0", "--out", "a.png"), "positive integer, got 0"),
    "none without a predictor": (
        ("sample", "--model", "{model}", "--nfe", "0", "--predictor", "none", "--out", "a.png"),
        "positive integer, got 0",
    ),
    "an unknown solver": (
        ("sample", "--model", "{model}", "--solver", "rk4", "--out", "a.png"),
        "unknown solver 'rk4'; valid names: euler, heun",
    ),
    "an unknown solver option": (
        ("sample", "--model", "{model}", "--solver", "ipndm", "--solver-option", "order=2", "--out", "a.png"),
        "no option order; valid options: max_order",
    ),
    "an unknown schedule": (
        ("sample", "--model", "{model}", "--schedule", "linear", "--out", "a.png"),
        "unknown schedule 'linear'",
    ),
    "a class too many": (
        ("sample", "--model", "{model}", "--solver", "euler", "--class", "4", "--out", "{tmp}/a.png"),
        r"0 \.\. 3, got 4",
    ),
    "an unknown device": (("sample", "--model", "{model}", "--device", "abacus", "--out", "a.png"), "'abacus'"),
    "another NFE's predictor": (
        ("sample", "--model", "{model}", "--predictor", "{predictor}", "--nfe", "7", "--out", "a.png"),
        "trained for nfe=3, got nfe=7",
    ),
    "too many columns": (("compare", "--model", "{model}", "--seeds", "0-63"), "at most 32"),
    "a student that cannot learn": (
        ("distill", "--model", "{model}", "--solver", "heun", "--out", "{tmp}/p.safetensors"),
        "takes no predictor",
    ),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_usage_is_one_line_and_exit_code_2(case, amed, model, predictor, tmp_path):
    args, message = USAGE[case]
    code, out, err = amed(*(arg.format(model=model, predictor=predictor, tmp=tmp_path) for arg in args))
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"amed: error: .*{message}.*\n", err)
    assert not Path("a.png").exists()


FAILURES = {
    "a folder that is a file": (("--out", "{file}/a.png"), "cannot write to folder .*file: "),
    "an outdir below a file": (("--outdir", "{file}/a"), "cannot write to folder .*: "),
    "a missing predictor": (("--predictor", "{tmp}/none.safetensors", "--out", "{tmp}/a.png"), "does not exist"),
    "a damaged predictor": (("--predictor", "{file}", "--out", "{tmp}/a.png"), "truncated"),
    "a model for a predictor": (("--predictor", "{model}", "--out", "{tmp}/a.png"), "expected a predictor"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_and_exit_code_1(case, amed, model, tmp_path):
    args, message = FAILURES[case]
    (tmp_path / "file").write_bytes(b"abc")
    places = {"file": tmp_path / "file", "tmp": tmp_path, "model": model}
    code, out, err = amed("sample", "--model", model, "--seeds", 0, *(arg.format(**places) for arg in args))
    *warnings, error = err.splitlines()
    assert (code, out) == (1, "")
    assert re.search(rf"^amed: error: .*{message}", error)
    assert all(line.startswith("amed: warning: no predictor") for line in warnings)


def test_samples_that_blow_up_are_a_failure_that_names_them(amed, tmp_path):
    network = EDMPrecond(
        8, 1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 1e30)
    save_model(network, tmp_path / "wild.safetensors")
    args = ("--model", tmp_path / "wild.safetensors", "--seeds", "3,8", "--solver", "euler", "--nfe", 3)
    code, _, err = amed("sample", *args, "--out", tmp_path / "a.png")
    assert code == 1
    assert re.fullmatch(r"amed: error: .*NaN or infinite in step 1 of \d, seeds \[3, 8\].*\n", err)
    assert not (tmp_path / "a.png").exists()


def boom(error: BaseException):
    def raise_it(*_, **__):
        raise error

    return raise_it


def noted(error: BaseException, note: str) -> BaseException:
    error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("first\nsecond"), "RuntimeError: first (amed --debug shows where)"),
        (OSError(28, "No space left on device", "/x.png"), "No space left on device: /x.png"),
        (MemoryError(), "MemoryError (amed --debug shows where)"),
        (noted(TypeError("two arguments"), "wrap it"), "TypeError: two arguments; wrap it (amed --debug shows where)"),
    ],
)
def test_what_nobody_expected_is_one_line_too(error, line, amed, model, monkeypatch):
    monkeypatch.setattr(sampler, "make_request", boom(error))
    code, _, err = amed("sample", "--model", model, "--solver", "euler", "--seeds", 0, "--out", "a.png")
    assert (code, err) == (1, f"amed: error: {line}\n")


def test_debug_shows_where(amed):
    code, _, err = amed("--debug", "sample", "--model", "nothing", "--out", "a.png")
    assert code == 2
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("amed: error: unknown model 'nothing'")


def test_an_interrupt_is_one_line_and_exit_code_130(amed, model, tmp_path, monkeypatch):
    monkeypatch.setattr("amed_engine.training.distill._train", boom(KeyboardInterrupt()))
    code, out, err = amed("distill", "--model", model, "--out", tmp_path / "p.safetensors")
    assert (code, out, err.strip()) == (130, "", "amed: error: interrupted")
    assert not (tmp_path / "p.safetensors").exists()


# ---- the bundled model ----


def test_the_bundled_model_samples_with_its_predictor_by_default(amed, tmp_path):
    code, out, err = amed("sample", "--seeds", "0-3", "--class", 3, "--out", tmp_path / "s.png")
    assert (code, err) == (0, "")
    assert "+ predictor" in out.splitlines()[0]
    assert out.splitlines()[0].endswith("NFE 5")
    code, out, err = amed("sample", "--seeds", "0-3", "--predictor", "none", "--out", tmp_path / "free.png")
    assert (code, err) == (0, "")
    assert "+ predictor" not in out.splitlines()[0]


def test_guidance_sets_the_bundled_predictor_aside_and_says_so_once(amed, tmp_path):
    args = ("--seeds", "0-3", "--batch", 2, "--nfe", 5, "--class", 3, "--guidance", 2.0)
    code, out, err = amed("sample", *args, "--out", tmp_path / "s.png")
    assert code == 0
    assert re.fullmatch(r"amed: warning: .*guidance_scale=2.0.*\n", err)
    assert "+ predictor" not in out.splitlines()[0]


def test_info_lists_the_bundled_predictors(amed):
    assert json.loads(amed("info", "--json")[1])["predictors"]["digits"] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert re.search(r"^  digits +3, 4, 5, 6, 7, 8, 9, 10$", amed("info")[1], re.MULTILINE)
