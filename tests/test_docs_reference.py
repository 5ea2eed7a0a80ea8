"""docs/build_reference.py: a page for every module that can be imported, and no warning passes."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("pdoc")

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "build_reference.py"
SOUND = '''"""A module, as `amed_engine.Sampler` is none."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Pair", "add"]

class Pair(NamedTuple):
    """Two numbers."""

    first: Path | None
    second: int

def add(pair: Pair) -> int:
    """first + second"""

from pathlib import Path
'''
ABSENT = """from amed_engine.errors import require
require("no_such_library", "litserve")
"""


def load_script():
    spec = importlib.util.spec_from_file_location("build_reference", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Runs the script on a package of these modules, name -> source: (exit code, its pages)."""
    script = load_script()

    def run(**sources: str) -> tuple[int, set[str]]:
        for name, source in {"__init__": '"""A package."""\n__all__ = []', **sources}.items():
            (tmp_path / "documented").mkdir(exist_ok=True)
            (tmp_path / "documented" / f"{name}.py").write_text(source)
        code = script.main(tmp_path / "out")
        return code, {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.html")}

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(script, "PACKAGES", ("documented",))
    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "documented"]:
        del sys.modules[name]


def test_every_module_gets_a_page_that_its_package_names(build, tmp_path):
    code, pages = build(sound=SOUND, _private="", __main__="raise SystemExit(3)")
    assert (code, pages) == (0, {"index.html", "documented.html", "documented/sound.html"})
    assert "documented/sound.html" in (tmp_path / "out" / "documented.html").read_text()


@pytest.mark.parametrize(
    ("before", "after", "warning"),
    [
        ('    """first + second"""', "    return 3", "documented.module.add is public and has no docstring"),
        (
            "amed_engine.Sampler",
            "amed_engine.Sampled",
            "documented.module names amed_engine.Sampled, which is not there",
        ),
        ("(pair: Pair)", "(pair: Pear)", "Pear"),
        ('"add"]', '"add", "sub"]', "sub"),
    ],
    ids=["no docstring", "a name that is not there", "an annotation", "__all__"],
)
def test_a_warning_fails(build, capsys, before, after, warning):
    code, _ = build(module=SOUND.replace(before, after))
    assert code == 1
    assert warning in capsys.readouterr().err


def test_a_module_without_its_library_may_be_named_in_a_docstring():
    """pkgutil.resolve_name takes what cannot be imported for what is not there."""
    script = load_script()
    assert script.resolves("amed_engine.integrations.comfyui.pack")  # needs ComfyUI
    assert not script.resolves("amed_engine.integrations.comfyui.packs")


def test_a_module_without_its_library_is_left_out_and_named(build, capsys):
    code, pages = build(sound=SOUND, absent=ABSENT)
    assert (code, "documented/absent.html" in pages) == (0, False)
    assert "left out: documented.absent: " in (told := capsys.readouterr().out)
    assert "pip install 'amed-engine[litserve]'" in told
