"""What the README shows, runs."""

import re
from pathlib import Path

import pytest

from amed_engine.cli import app

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("source", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_a_code_block_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["result"].images.isfinite().all()


def test_there_is_a_short_code_block():
    assert [len(block.splitlines()) <= 15 for block in BLOCKS] == [True]


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_commands_and_options_it_shows_exist():
    shown = re.findall(r"^    amed (\S+) ([^#\n]*)", README, flags=re.MULTILINE)
    assert {name for name, _ in shown} == app.commands.keys() - {"info"}
    for name, line in shown:
        options = {option for parameter in app.commands[name].params for option in parameter.opts}
        assert {word for word in line.split() if word.startswith("--")} <= options, name
