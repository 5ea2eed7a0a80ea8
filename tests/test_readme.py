"""The README is short, and shows the commands that there are."""

import re
from pathlib import Path

from amed_engine.cli import app

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


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
