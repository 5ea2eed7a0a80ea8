"""findings/: every script is in the table, pins what it installs and cleans up. The scripts themselves need the network."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
ROWS = dict(
    re.findall(r"^\| \[\w+\]\((\w+\.sh)\) \| ([^|]+) \|", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
)


def test_the_table_names_every_script():
    assert list(ROWS) == [script.name for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_pins_what_it_installs(script):
    (packages,) = re.findall(r"pip\" install --quiet (.+)$", script.read_text("utf-8"), re.MULTILINE)
    pins = [
        re.sub(r"'|\[.*?\]", "", package).partition("==")[::2] for package in packages.split()
    ]  # extras are no name
    assert all(version for _, version in pins)
    assert set(ROWS[script.name].split(", ")) <= {f"{name} {version}" for name, version in pins}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_what_it_is_for_and_does_without_the_engine(script):
    text = script.read_text("utf-8")
    heads = ("# Versions: ", "# Expected: ", "# Seen: ", "# Why it matters: ", "set -euo pipefail", "trap 'rm -rf")
    assert [head for head in heads if f"\n{head}" not in text] == []
    assert not re.search(r"\bamed|kernels", text)
