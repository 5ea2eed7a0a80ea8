"""`amed generate`: what it says, refuses and hands on; the drawing itself is tested in tests/datasets."""

import json

import numpy as np
import pytest
from dataset_folders import contents

from amed_engine import Sampler, generate_dataset, load_package
from amed_engine.cli import app, console
from amed_engine.cli.commands import generate as command
from amed_engine.datasets import formats

JOB = ["generate", "--model", "digits", "--nfe", "3", "--seeds", "0-19", "--format", "npz"]


@pytest.fixture
def amed(capsys):
    """(arguments) -> exit code, what was printed, what went to stderr."""

    def run(*arguments):
        code = console.run(app, list(map(str, arguments)))
        return code, *capsys.readouterr()

    return run


def test_every_format_has_its_name():
    assert set(command.FORMATS) == set(formats.FORMATS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    assert console.run(app, [*JOB, "--out", str(folder)]) == 0
    return folder


def test_it_says_what_is_there(amed, whole, tmp_path):
    code, printed, errors = amed(*JOB, "--out", whole, "--verify", 2)
    assert code == 0, errors
    lines = printed.splitlines()
    assert lines[0] == f"20 of 20 samples are in {whole}, 0 of them new"
    assert lines[2] == "2 samples drawn again: the same"
    assert lines[3].startswith("set hash ")
    code, printed, errors = amed(*JOB, "--out", whole, "--json", "-")
    assert code == 0, errors
    report = json.loads(printed)
    assert (report["samples"], report["drawn"], report["interrupted"]) == (20, 0, False)
    assert lines[3] == f"set hash {report['set_hash']}"


def test_another_job_is_refused_and_overwritten_when_asked(amed, tmp_path):
    folder = tmp_path / "data"
    assert amed(*JOB, "--out", folder)[0] == 0
    code, _, errors = amed(*JOB, "--out", folder, "--class", 3)
    assert (code, "labels is null there, 3 here" in errors, "--overwrite" in errors) == (2, True, True)
    code, _, errors = amed(*JOB, "--out", folder, "--class", 3, "--overwrite")
    assert code == 0, errors
    assert f"overwriting {folder}: removing 1 shard(s), 20 samples" in errors
    assert {label for _, label in contents(folder).values()} == {3}


@pytest.mark.parametrize("option", ["--labels", "--class"])
def test_a_file_has_a_line_for_each_seed(amed, tmp_path, option):
    file = tmp_path / "labels.txt"
    file.write_text("".join(f"{row % 10}\n" for row in range(20)))
    code, _, errors = amed(*JOB, "--out", tmp_path / "data", option, file)
    assert code == 0, errors
    assert np.load(tmp_path / "data" / "shard-000000.npz")["labels"].tolist() == [row % 10 for row in range(20)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--labels", "nowhere.txt"],
            "--labels is a file, or one of rows, index, float, vector; 'nowhere.txt' is no file",
        ),
        (["--labels", "rows"], "--labels is of a raw network"),
        (["--labels", "{two}"], "two.txt has 2 lines with labels and --seeds names 20; write a line for each seed"),
        (["--seeds", "0-3,2"], "seeds are named twice: 2"),
        (["--store", "float32", "--format", "png"], "png holds pictures"),
        (["--shard", "0"], "--shard"),
        (["--format", "gif"], "--format"),
        (["--class", "11"], "class"),
    ],
)
def test_what_cannot_be_is_refused(amed, tmp_path, arguments, says):
    (tmp_path / "two.txt").write_text("1\n2\n")
    arguments = [word.format(two=tmp_path / "two.txt") for word in arguments]
    code, _, errors = amed(*JOB, "--out", tmp_path / "data", *arguments)
    assert code == 2
    assert says in errors
    assert not (tmp_path / "data").exists()


def denoiser(x, sigma):
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "loop.pt2"
    Sampler(denoiser, solver="euler", nfe=2, shape=(1, 8, 8), device="cpu").export(path, format="exported")
    return path


def test_a_package_draws_what_it_draws_in_python(amed, package, tmp_path):
    job = ["generate", "--package", package, "--seeds", "0-19", "--format", "npz"]
    code, printed, errors = amed(*job, "--out", tmp_path / "data", "--verify", 2)
    assert code == 0, errors
    same = generate_dataset(load_package(package), "0-19", tmp_path / "same", format="npz", batch=20)
    assert printed.splitlines()[-1] == f"set hash {same.set_hash}"
    code, _, errors = amed(*job, "--out", tmp_path / "data", "--class", 4)
    assert (code, "the model is unconditional" in errors) == (2, True)


@pytest.mark.parametrize(
    "fixed",
    [("--nfe", 3), ("--model", "digits"), ("--guidance", 1), ("--device", "cpu"), ("--afs",), ("--labels", "rows")],
)
def test_a_package_says_all_of_how_it_draws(amed, package, tmp_path, fixed):
    code, _, errors = amed("generate", "--package", package, "--seeds", "0", "--out", tmp_path / "data", *fixed)
    assert (code, f"leave {fixed[0]}" in errors) == (2, True)
    assert not (tmp_path / "data").exists()


def test_a_loop_in_place_of_a_model_is_told_its_option(amed, package, tmp_path):
    code, _, errors = amed("generate", "--model", package, "--seeds", "0", "--out", tmp_path / "data")
    assert (code, "`amed generate --package`" in errors) == (2, True)


def test_labels_twice_are_refused(amed, tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("1\n" * 20)
    code, _, errors = amed(*JOB, "--out", tmp_path / "data", "--labels", file, "--class", 1)
    assert (code, "exclude each other" in errors) == (2, True)


@pytest.mark.parametrize("option", [["--overwrite"], ["--workers", "2"]])
def test_what_one_process_has_to_do_is_refused_under_torchrun(amed, tmp_path, monkeypatch, option):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = amed(*JOB, "--out", tmp_path / "data", *option)
    assert (code, "under torchrun there is no" in errors) == (2, True)


def test_a_file_in_place_of_the_folder(amed, tmp_path):
    (tmp_path / "data").write_text("mine")
    code, _, errors = amed(*JOB, "--out", tmp_path / "data")
    assert (code, "cannot write to folder" in errors) == (1, True)
    assert (tmp_path / "data").read_text() == "mine"


def test_floats(amed, tmp_path):
    code, _, errors = amed(*JOB, "--out", tmp_path / "data", "--store", "float16", "--shard", 20, "--batch", 10)
    assert code == 0, errors
    arrays = np.load(tmp_path / "data" / "shard-000000.npz")["arr_0"]
    assert (arrays.shape, arrays.dtype) == ((20, 1, 8, 8), np.float16)
