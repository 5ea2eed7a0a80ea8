"""What docs/c-api.md and docs/cupy.md show, runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def run_python(page: str) -> dict:
    names: dict = {}
    for source in blocks(page, "python"):
        exec(compile(source, page, "exec"), names)
    return names


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("pkg-config")), reason="no gcc or no pkg-config")
def test_the_c_page_has_the_sampler_s_bits(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python("c-api.md")
    (tmp_path / "host.c").write_text(blocks("c-api.md", "c")[0])
    (script,) = blocks("c-api.md", "sh")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-e", "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_array_page_agrees_with_the_sampler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_python("cupy.md")
    np.testing.assert_allclose(names["images"], names["expected"], atol=5e-6 * np.abs(names["expected"]).max())
