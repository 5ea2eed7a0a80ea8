"""The C library under the address, undefined-behaviour and thread sanitizers, its loader against mutated plans."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from amed_engine import make_solver
from amed_engine.engine.export.tableau import MeanRows
from amed_engine.engine.export.write_plan import make_tableau, write_plan
from amed_engine.solvers.program import Program

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CSRC / 'include'}", "-O1", "-fopenmp"]
MEAN = MeanRows.of(4, [[0.5, 1.0, 1.5], [-1.0, 2.0, 3.0]])
MUTATIONS = int(os.environ.get("AMED_FUZZ_PLANS", "4000"))


@pytest.fixture
def plans(tools, tmp_path) -> list[Path]:
    """Noise prediction with memory, data prediction with thresholds, parallel points, a predictor, and means of classes."""
    sigmas, predictor = tools.SIGMAS, tools.predictor(hidden_dim=3)
    programs = [
        tools.program("ipndm", afs=True, last=True),
        Program.build(make_solver("dpmpp", thresholding=True), sigmas, afs=True),
        tools.program("epd", refined=True),
        tools.program("unipc"),
        Program.build(make_solver("ipndm", max_order=2), sigmas, predictor, afs=True),
    ]
    paths = [tmp_path / f"{k}.json" for k in range(len(programs))]
    for program, path in zip(
        programs, paths, strict=True
    ):  # without hashes, which would keep mutants from what follows
        path.write_text(make_tableau(program).dumps())
    write_plan(programs[0], tmp_path / "hashed.json")
    text = replace(make_tableau(tools.program("dpmpp", afs=True)), shape=(3,), mean=MEAN).dumps()
    (tmp_path / "mean.json").write_text(text)
    return [*paths, tmp_path / "mean.json", tmp_path / "hashed.json"]


def build(tmp_path: Path, options: list[str]) -> Path:
    sources = [*CSRC.glob("tests/library/*.cpp"), *CSRC.glob("library/*.cpp"), *CSRC.glob("cpu/*.cpp")]
    program = tmp_path / "test_library"
    command = [COMPILER, *FLAGS, *options, "-DAMED_NO_CLONES", *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_library_holds_under_the_sanitizers(plans, tmp_path):
    program = build(tmp_path, ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    done = subprocess.run([program, str(MUTATIONS), *plans], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.strip().endswith("ok"), done.stdout


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_no_two_threads_race(plans, tmp_path):
    """Threads on one sampler, and on samplers of one plan, under the thread sanitizer."""
    program = build(tmp_path, ["-fsanitize=thread"])
    # Without randomized addresses, where that is allowed: this sanitizer refuses some layouts.
    for prefix in ([], ["setarch", "-R"]):
        if prefix and not shutil.which(prefix[0]):
            continue
        done = subprocess.run([*prefix, program, "0", *plans], capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            break
    if "unexpected memory mapping" in done.stderr or "setarch:" in done.stderr:
        pytest.skip(f"the thread sanitizer does not run here: {done.stderr[:200]}")
    assert (done.returncode, done.stdout.strip()[-2:]) == (0, "ok"), done.stdout[-3000:] + done.stderr[-3000:]
