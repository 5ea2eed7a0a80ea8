"""What the pages show, runs; what they say of options and numbers is so."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import amed_engine
from amed_engine import ConfigError
from amed_engine.adapters import PREDICTIONS
from amed_engine.cli import app
from amed_engine.evaluation.metrics.classifier import load_classifier

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def text(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(page), flags=re.DOTALL)


# ---- what holds after a block: of its names, and of what the page printed so far


def result(names, printed):
    assert np.isfinite(np.asarray(names["result"].images)).all()


def images(count: int) -> Callable:
    def check(names, printed):
        assert len(names["images"]) == count
        assert np.isfinite(np.asarray(names["images"])).all()

    return check


def host_in_c(names, printed):
    """The sampler's bits, by the page's program and its shell commands."""
    if not (shutil.which("gcc") and shutil.which("pkg-config")):
        pytest.skip("no gcc or no pkg-config")
    try:
        amed_engine.get_library()
    except ConfigError as error:
        pytest.skip(str(error))
    Path("host.c").write_text(blocks("docs/c-api.md", "c")[0])
    (script,) = blocks("docs/c-api.md", "sh")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-e", "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def stepper(names, printed):
    np.testing.assert_allclose(names["images"], names["expected"], atol=5e-6 * np.abs(names["expected"]).max())


def distance(names, printed):
    assert names["distance"] > 0


def errors(names, printed):
    assert names["errors"].shape == (16,)
    assert (names["errors"] > 0).all()


def evaluation(names, printed):
    found = names["found"]
    assert found.samples == 32
    assert found.distance.rmse > 0
    assert found.class_accuracy > 0.5
    assert f"RMSE {found.distance.rmse:.4f}" in printed


def judged(names, printed):
    found = names["found"]
    assert (found.samples, found.nfe) == (32, 5)
    assert found.class_accuracy > 0.5
    assert "against digits: Frechet distance" in printed


def manifold(names, printed):
    distance(names, printed)
    assert 0 < names["recall"] <= 1
    assert 0 < names["precision"] <= 1


def fitted(names, printed):
    images(4)(names, printed)
    assert names["predictor"].plan.nfe == 5


def two_ways(names, printed):
    assert "'cpu': " in printed
    torch.testing.assert_close(names["y"], names["x"] - names["d"] / 2)
    torch.testing.assert_close(names["x_next"], names["plain"][1])


def described(names, printed):
    if "result" in names:
        result(names, printed)
    else:  # of blocks that draw videos
        assert names["videos"].isfinite().all()
    shown = re.search(r"says what was inferred and why:\n\n((?:    .*\n)+)", text("docs/models.md"))[1]
    for line in shown.splitlines():
        assert re.sub(r"\s+", " ", line).strip() in re.sub(r"\s+", " ", printed)


def calibrated(names, printed):
    images(4)(names, printed)
    plan = names["calibration"].plan
    assert plan.nfe == 4
    assert plan.describe() in printed.splitlines()[1]


def searched(names, printed):
    images(4)(names, printed)
    assert len(names["levels"]) == 6


def rows_of_updates(names, printed):
    levels = names["levels"].tolist()
    assert [line.partition(" ")[0] for line in printed.splitlines()] == [str(level) for level in levels[:-1]]


def nodes(names, printed):
    assert names["NODE_CLASS_MAPPINGS"].keys() == names["NODE_DISPLAY_NAME_MAPPINGS"].keys()
    shown = re.findall(r"^\| ((?:\w+ )*AMED(?: \w+)*) \|", text("docs/integrations/comfyui.md"), flags=re.MULTILINE)
    assert sorted(names["NODE_DISPLAY_NAME_MAPPINGS"].values()) == sorted(shown)


def own_levels(names, printed):
    assert callable(names["entry"][1])
    assert torch.equal(names["sigmas"], names["predictor"].plan.levels.float())


def trajectory(names, printed):
    assert len(names["x"])
    assert names["x"].isfinite().all()


def served(names, printed):
    assert "/predict" in {route.path for route in names["server"].app.routes}


def served_over_http(names, printed):
    """The page's client, and its shell commands against a server of their own; once, at the end of the page."""
    if "refused" not in names:
        assert names["server"].started
        return
    assert names["arrays"]["images"].shape == (2, 1, 8, 8)
    from_noise = amed_engine.Sampler("digits").run(torch.from_numpy(names["noise"]), class_labels=7)
    torch.testing.assert_close(torch.from_numpy(names["drawn"]["images"]), from_noise.images, rtol=0, atol=2e-5)
    assert "seeds" not in names["drawn"]
    assert printed.count("event: sample") == 3
    assert "event: done\n422 unknown key 'steps'; known are model" in printed
    if not shutil.which("curl"):
        pytest.skip("no curl")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (script,) = blocks("docs/serving.md", "sh")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = script.replace("8000", str(port))
    done = subprocess.run(["sh", "-e", "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"serving digits on http://127.0.0.1:{port}\n" in done.stdout
    assert done.stdout.count("event: sample") == 4
    assert done.stdout.count('{"b64_json":"') == 2
    assert Path("three.png").read_bytes().startswith(b"\x89PNG")
    assert len(np.load("four.npz")["images"]) == 4


def deployment(names, printed):
    assert type(names["app"]).__name__ == "Application"


def repository(names, printed):
    folder = Path("models/amed")
    assert names["folder"] == folder
    assert (folder / "config.pbtxt").is_file()
    assert (folder / "1" / "model.py").is_file()


def generated(names, printed):
    report = names["report"]
    assert (report.samples, report.drawn) == (report.wanted, report.wanted)
    assert report.set_hash in printed


def continuous(names, printed):
    if "done" not in names:
        assert len(names["images"]) == 2
        assert "backend ticks" in printed
    else:
        assert sorted(names["done"]) == list(range(8))
        assert "evaluations=32" in printed


def stored(names, printed):
    """Of the blocks so far, each its own library's view of the same pictures."""
    if "seeds" in names:
        assert names["seeds"].tolist() == list(range(names["seeds"][0], names["seeds"][0] + 50))
    if "images" in names:
        assert len(names["images"]) in (50, 100)
    if "table" in names:
        assert names["table"].num_rows == names["same"].num_rows == 50
        assert names["first"].startswith(b"\x89PNG")
    if "samples" in names:
        assert printed.splitlines()[-1] == "50 (50, 8, 8, 1) (50,)"


def drawn_by_actors(names, printed):
    assert (names["report"].samples, names["report"].drawn) == (200, 200)
    assert names["report"].set_hash in printed


class Program(NamedTuple):
    """Blocks of a page that run one after the other, what holds after each, the libraries without which none can, and whether
    they take long."""

    check: Callable | None = None  # None: the block asserts itself
    needs: tuple[str, ...] = ()
    blocks: int = 1
    slow: bool = False


# Page -> its programs, in order.
PROGRAMS = {
    "README.md": [Program(result)],
    "docs/architecture.md": [Program(rows_of_updates)],
    "docs/arrays.md": [Program(result)],
    "docs/c-api.md": [Program(host_in_c)],
    "docs/checkpoints.md": [Program(), Program(), Program(), Program(), Program()],
    "docs/continuous.md": [Program(continuous, blocks=2)],
    "docs/cupy.md": [Program(stepper)],
    "docs/datasets.md": [
        Program(generated, blocks=2),
        Program(drawn_by_actors, needs=("ray.data",)),
        Program(stored, needs=("webdataset", "pyarrow", "zarr", "diffusers"), blocks=9, slow=True),
    ],
    "docs/evaluation.md": [
        Program(distance),
        Program(errors),
        Program(evaluation),
        Program(judged, needs=("sklearn",)),
        Program(manifold),
    ],
    "docs/export.md": [
        Program(result),
        Program(result, needs=("onnxscript", "onnxruntime")),
        Program(result, needs=("diffusers",)),
    ],
    "docs/fitting.md": [Program(fitted)],
    "docs/kernels.md": [Program(two_ways)],
    "docs/models.md": [Program(described, blocks=9)],
    "docs/output.md": [Program()],
    "docs/schedules.md": [Program(calibrated), Program(), Program(searched)],
    "docs/serving.md": [
        Program(served_over_http, needs=("fastapi", "uvicorn", "prometheus_client"), blocks=2),
        Program(),
    ],
    "docs/solvers.md": [Program(), Program()],
    "docs/training.md": [Program(result), Program(result)],
}
INTEGRATIONS = {
    "docs/integrations/comfyui.md": [Program(nodes), Program(own_levels)],
    "docs/integrations/diffusers.md": [
        Program(trajectory, needs=("diffusers",)),
        Program(trajectory, needs=("diffusers",)),
        Program(images(2), needs=("diffusers",)),
        Program(images(2), needs=("diffusers",)),
    ],
    "docs/integrations/k_diffusion.md": [Program(images(4))],
    "docs/integrations/litserve.md": [Program(served, needs=("litserve",))],
    "docs/integrations/physicsnemo.md": [Program(trajectory)],
    "docs/integrations/ray.md": [Program(deployment, needs=("ray",))],
    "docs/integrations/triton.md": [Program(repository)],
}


def rows(table: dict[str, list[Program]]) -> list:
    """(page, program, number of its first block) of every program."""
    slow = {True: pytest.mark.slow, False: ()}
    return [
        pytest.param(
            page, program, sum(before.blocks for before in programs[:i]), id=f"{page}-{i}", marks=slow[program.slow]
        )
        for page, programs in table.items()
        for i, program in enumerate(programs)
    ]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, off_checkout):
    monkeypatch.chdir(tmp_path)

    def run(page, program, first):
        for library in program.needs:
            pytest.importorskip(library, reason=f"{library} is not installed")
        names, printed = {"__name__": "__main__"}, ""  # as a file that is run
        for source in blocks(page)[first : first + program.blocks]:
            names.pop("result", None)
            exec(compile(source, page, "exec"), names)
            printed += capsys.readouterr().out
            if program.check:
                program.check(names, printed)

    return run


@pytest.mark.parametrize(("page", "program", "first"), rows(PROGRAMS))
def test_a_program_runs(page, program, first, run):
    run(page, program, first)


@pytest.mark.parametrize(("page", "program", "first"), rows(INTEGRATIONS))
def test_a_program_of_an_integration_runs(page, program, first, run):
    """Apart from the others, for `make test-integrations`."""
    run(page, program, first)


def test_every_code_block_has_its_row():
    shown = {page: len(blocks(page)) for page in PAGES if blocks(page)}
    assert {page: sum(p.blocks for p in programs) for page, programs in {**PROGRAMS, **INTEGRATIONS}.items()} == shown
    fences = {fence for page in PAGES for fence in re.findall(r"^\s*(?:```|~~~)(.+)$", text(page), flags=re.MULTILINE)}
    assert fences == {"python", "c", "sh"}, "a block that no row can find"


def test_what_has_no_check_asserts_itself():
    alone = [row.values for row in rows({**PROGRAMS, **INTEGRATIONS}) if row.values[1].check is None]
    sources = [blocks(page)[first : first + program.blocks] for page, program, first in alone]
    assert sources
    assert all(re.search("^assert ", source, flags=re.MULTILINE) for program in sources for source in program)


# ---- what the pages say of options and numbers


def test_every_prediction_is_described():
    assert PREDICTIONS
    for name in PREDICTIONS:
        assert f'`"{name}"`' in text("docs/models.md")


def options(*commands: str) -> set[str]:
    return {name for command in commands for option in app.commands[command].params for name in option.opts}


def test_options_and_recipes_that_are_shown_exist(amed):
    page = text("docs/checkpoints.md")
    assert {"--set"} <= set(re.findall(r"--[a-z][a-z-]*", page)) <= options("convert", "reproduce") | {"--model"}
    recipes = re.findall(r"amed reproduce (\S+-\d+)", page)
    assert len(recipes) == 2
    assert set(recipes) <= {line.split()[0] for line in amed("reproduce", "--list")[1].splitlines()}


def test_options_of_evaluate_that_are_shown_exist():
    shown = re.findall(r"^    amed evaluate (.*)$", text("docs/evaluation.md"), flags=re.MULTILINE)
    assert len(shown) == 4
    assert {word for line in shown for word in line.split() if word.startswith("--")} <= options("evaluate")


def test_the_accuracy_that_is_stated_is_the_classifier_s():
    _, report = load_classifier()
    stated = f"{100 * report['accuracy_held_out']:.2f} % of the\n  {report['images_held_out']} held out"
    assert stated in text("docs/evaluation.md")


def test_every_integration_has_a_page():
    folder = ROOT / "amed_engine" / "integrations"
    shared = {"__init__", "__pycache__", "common", "require", "serving", "hosted", "requests", "tritonserver"}
    routes = {p.stem for p in [*folder.iterdir(), *(folder / "serving").iterdir()]} - shared
    pages = {path.stem for path in (ROOT / "docs" / "integrations").glob("*.md")}
    assert pages == routes - {"cupy"}  # beside the C API: docs/cupy.md
