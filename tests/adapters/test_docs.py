"""What docs/models.md shows, runs."""

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_code_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    assert len(BLOCKS) == 4
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for source in BLOCKS:
        names.pop("result", None)
        exec(compile(source, "docs/models.md", "exec"), names)
        assert names["result"].images.isfinite().all()
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    shown = re.search(r"says what was inferred and why:\n\n((?:    .*\n)+)", TEXT)[1]
    for line in shown.splitlines():
        assert re.sub(r"\s+", " ", line).strip() in printed


def test_every_prediction_is_described():
    from amed_engine.adapters import PREDICTIONS

    for name in PREDICTIONS:
        assert f'`"{name}"`' in TEXT
