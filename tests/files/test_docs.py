"""What docs/checkpoints.md shows, runs; what it names, exists."""

import re
from pathlib import Path

import pytest

from amed_engine.cli.commands.convert import convert
from amed_engine.cli.commands.reproduce import reproduce
from amed_engine.evaluation.published.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "checkpoints.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("source", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_a_code_block_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "checkpoints.md", "exec"), {})


def test_options_and_recipes_that_are_shown_exist():
    options = {name for command in (convert, reproduce) for option in command.params for name in option.opts}
    assert set(re.findall(r"--[a-z][a-z-]*", TEXT)) <= options | {"--model"}
    assert len(BLOCKS) == 3
    for name in re.findall(r"amed reproduce (\S+-\d+)", TEXT):
        load_recipe(name)


def test_files_that_are_named_exist():
    for name in re.findall(r"amed_engine/[\w/.]+", TEXT):
        assert (ROOT / name).exists(), name
