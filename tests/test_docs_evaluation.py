"""What docs/evaluation.md shows, runs."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("source", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_a_code_block_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(source, "evaluation.md", "exec"), names)
    assert names.get("distance", 1) > 0


def test_the_accuracy_it_states_is_the_classifier_s():
    from amed_engine.evaluation.metrics.classifier import load_classifier

    _, report = load_classifier()
    assert f"{100 * report['accuracy_held_out']:.2f} % of the\n  {report['images_held_out']} held out" in PAGE


def test_commands_and_options_it_shows_exist():
    from amed_engine.cli.commands.evaluate import evaluate

    options = {name for option in evaluate.params for name in option.opts}
    shown = re.findall(r"^    amed evaluate (.*)$", PAGE, flags=re.MULTILINE)
    assert len(shown) == 3
    assert {word for line in shown for word in line.split() if word.startswith("--")} <= options


def test_there_are_code_blocks():
    assert len(BLOCKS) == 4
