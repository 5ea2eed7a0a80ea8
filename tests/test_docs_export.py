"""What the pages on exporting and on arrays show, runs."""

import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCKS = [
    (page, source)
    for page in ("export.md", "arrays.md")
    for source in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), flags=re.DOTALL)
]


@pytest.mark.parametrize(("page", "source"), BLOCKS, ids=[f"{page}{i}" for i, (page, _) in enumerate(BLOCKS)])
def test_a_code_block_runs(page, source, tmp_path, monkeypatch):
    for library in (
        ("onnxscript", "onnxruntime") if "onnx" in source else ("diffusers",) if "diffusers" in source else ()
    ):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(source, page, "exec"), names)
    assert np.isfinite(np.asarray(names["result"].images)).all()


def test_the_pages_have_code_blocks():
    assert [page for page, _ in BLOCKS] == ["export.md", "export.md", "export.md", "arrays.md"]
