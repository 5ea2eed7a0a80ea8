"""What docs/architecture.md and README.md say of the structure is so."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amed_engine import make_solver
from amed_engine.solvers.program import Program

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


def load(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its first two lines."""
    part = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_worked_example_is_what_the_solver_says():
    stated: dict[float, list[list[float]]] = {}
    for sigma, _, *cells in table("How a solver becomes a matrix"):
        stated.setdefault(float(sigma), []).append([float(cell) for cell in cells if cell])
    levels = torch.tensor([8.0, 4.0, 2.0, 1.0])
    program = Program.build(make_solver("ipndm", max_order=2), levels)
    assert program.updates is not None
    made = {float(s): u.coeffs[..., 0].tolist() for s, (u,) in zip(levels[:-1], program.updates, strict=True)}
    assert stated == made


def test_the_picture_has_the_present_coefficients():
    pytest.importorskip("matplotlib")
    script = load(ROOT / "docs" / "draw_program.py")
    with Image.open(ROOT / "docs" / "program.png") as picture:
        drawn = json.loads(picture.text["coefficients"])
    for old, new in zip(drawn, script.coefficients(script.PLANS), strict=True):
        for before, now in zip(old, new, strict=True):
            np.testing.assert_allclose(before, now, rtol=1e-9, atol=1e-12)


def test_a_picture_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    load(ROOT / "docs" / "draw_program.py").main(tmp_path / "program.png")
    with Image.open(tmp_path / "program.png") as picture:
        assert min(picture.size) > 400


def rows() -> list[set[str]]:
    return [set(entries) for entries in load(ROOT / "tests" / "test_layers.py").ROWS]


def test_the_readme_shows_the_rows_that_are_tested():
    block = README.split("## Layout\n", 1)[1].split("\n    ", 1)[1].split("\n\n", 1)[0]
    shown = [set(re.split(r",\s*", re.split(r"\s{2,}", line.strip())[0])) for line in block.splitlines()]
    tested = [entries - {"metrics", "__main__"} for entries in reversed(rows())]
    assert shown == [entries for entries in tested if entries]


def test_every_package_has_its_sentence():
    named = [re.sub(r"`", "", name) for name, _ in table("Packages")]
    assert set(named) == set().union(*rows()) - {"metrics", "__main__"}
    assert len(named) == len(set(named))


def test_what_the_page_points_to_is_there():
    answers = [re.findall(r"`(\w+)` in `([\w/.]+)`", answer) for _, answer in table("Where is ...")]
    assert any(answers)
    for name, path in (pair for pairs in answers for pair in pairs):
        assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / path).read_text("utf-8"), re.MULTILINE), (name, path)
    paths = re.findall(r"`((?:amed_engine|kernels|csrc|tests|docs)/[\w/.]+)`", PAGE)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
