"""Names of solvers come from one table: no list of them is written by hand outside amed_engine/solvers/."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amed_engine import AMEDPredictor, ConfigError, Midpoint, make_plan, solvers
from amed_engine.engine.export.write_plan import make_tableau
from amed_engine.evaluation.comparison import TRAINING_FREE
from amed_engine.evaluation.figure import style
from amed_engine.solvers import SOLVERS, USE_WITH_PREDICTOR, integrator_names, solver_names
from amed_engine.solvers.base import Solver
from amed_engine.solvers.program import Program

ROOT = Path(__file__).resolve().parents[2]
LIST = 3  # names: fewer are examples
# "amed" is the command and the package as well.
NAMES = re.compile(rf"\b({'|'.join(name for name in SOLVERS if name != 'amed')})\b")


def texts(node: ast.AST) -> Iterator[str]:
    """All text under a node."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def lists(source: str) -> list[str]:
    """Text and collections that name several solvers: help, docstrings, messages, tuples, lists, sets, dicts."""
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp, ast.Tuple, ast.List, ast.Set, ast.Dict)
    found = (
        set(NAMES.findall(" ".join(texts(node)))) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)
    )
    return [", ".join(sorted(names)) for names in found if len(names) >= LIST]


def test_no_list_of_solvers_is_written_by_hand():
    files = [
        *(ROOT / "amed_engine").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
    files = [path for path in files if ROOT / "amed_engine" / "solvers" not in path.parents]
    assert len(files) > 100
    assert not {str(path.relative_to(ROOT)): named for path in files if (named := lists(path.read_text("utf-8")))}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('option("--solver", help="euler, heun or dpm.")', True),
        ('"""As `euler`, `heun` and ipndm."""', True),
        ('TAKES = ("euler", "unipc", "deis")', True),
        ('COLOURS = {"euler": "gray", "dpmpp noise": "blue", "unipc-2": "red"}', True),
        ('STARTS = [("euler", 1), ("heun", 2), ("dpm", 3)]', True),
        ('raise ConfigError(f"{name} is none: use dpm, " + f"{other}, euler or ipndm")', True),
        ('if solver in {"euler", "heun", "dpm"}: pass', True),
        ('SOLVER = ("euler", "heun")', False),
        ('"euler\'s eulerian heuns"', False),
        ('a, b, c = f("euler"), f("heun"), f("dpm")', True),
        ('f("euler")\nf("heun")\nf("dpm")', False),
        ('", ".join(SOLVERS)', False),
    ],
)
def test_the_scanner_tells_a_list_from_an_example(source, found):
    assert bool(lists(source)) is found


def test_the_scanner_finds_the_table_itself():
    assert lists((ROOT / "amed_engine" / "solvers" / "__init__.py").read_text("utf-8"))


def test_the_table_says_what_the_classes_say():
    for use in ("none", "optional", "required"):
        assert solver_names(use) == [name for name, solver in SOLVERS.items() if solver.takes_predictor == use]
    assert solver_names("none", "optional", "required") == list(SOLVERS)
    assert integrator_names("none", "optional", "required") == [name for name in SOLVERS if SOLVERS[name].integrates]
    assert all(issubclass(solver, Solver) for solver in SOLVERS.values())
    assert all(getattr(solvers, solver.__name__) is solver for solver in (Solver, *SOLVERS.values()))
    assert "rk4" not in SOLVERS
    assert USE_WITH_PREDICTOR == "use amed, or a plugin on euler, dpm, ipndm, deis, dpmpp, unipc"


def test_names_cost_no_torch():
    code = (
        "import sys, amed_engine.solvers as s\n"
        "assert 'heun' in ' '.join([*s.solver_names('none'), s.USE_WITH_PREDICTOR, *s.SOLVERS])\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_compared_are_all_integrators_that_need_no_predictor():
    assert list(dict.fromkeys(solver for solver, _ in TRAINING_FREE.values())) == integrator_names("none", "optional")
    assert list(TRAINING_FREE) == [
        *("euler", "heun", "dpm-2", "ipndm-2", "ipndm-3", "ipndm-4", "deis-3"),
        *("dpmpp-2 noise", "dpmpp-3 noise", "dpmpp-2 data", "dpmpp-3 data", "unipc-2", "unipc-3"),
    ]


def test_families_have_colours_and_orders_dashes():
    looks = {name: style(name) for name in TRAINING_FREE}
    assert len(set(looks.values())) == len(looks)
    assert looks["ipndm-2"] == ("tab:blue", "--")
    assert looks["dpmpp-3 data"] == ("tab:red", "-")
    assert {style(name)[0] for name in ("amed", "nonstationary", "ipndm-2 + amed", "reference")} == {"black"}


@pytest.mark.parametrize("name", [n for n in integrator_names("optional", "required") if SOLVERS[n].answer is Midpoint])
def test_what_is_tabulated_goes_into_a_table_with_its_predictor(name):
    plan = make_plan(6, solver=name, midpoint=True)
    program = Program.build(plan.make_solver(), plan.levels, AMEDPredictor(scale_dir=0.1, bottleneck=(4, 4)))
    if SOLVERS[name].tabulated:
        assert make_tableau(program).predictor is not None
        return
    with pytest.raises(ConfigError, match="use amed, dpm, euler or ipndm, or pass freeze=True"):
        make_tableau(program)
