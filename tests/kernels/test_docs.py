"""What docs/kernels.md shows, runs."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def test_the_page_runs_and_its_two_ways_agree(capsys):
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(compile(source, PAGE.name, "exec"), names)
    assert "'cpu': " in capsys.readouterr().out
    torch.testing.assert_close(names["y"], names["x"] - names["d"] / 2)
    torch.testing.assert_close(names["x_next"], names["plain"][1])
