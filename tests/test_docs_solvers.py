"""docs/solvers.md names every solver and every schedule there is."""

import re
from pathlib import Path

from amed_engine.solvers import SOLVERS
from amed_engine.solvers.schedule import SCHEDULES

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "solvers.md").read_text("utf-8")


def test_every_solver_has_a_row():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == SOLVERS.keys()


def test_every_schedule_is_named():
    (sentence,) = re.findall(r"Schedules: ((?:`\w+`, )+)levels", PAGE)
    assert set(re.findall(r"`(\w+)`", sentence)) == SCHEDULES.keys()
