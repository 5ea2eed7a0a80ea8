"""What docs/fitting.md shows runs, and `amed fit` writes what it says."""

import re
from pathlib import Path

from click.testing import CliRunner

from amed_engine import Sampler, load_predictor
from amed_engine.checkpoints import save_model
from amed_engine.cli import app

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "fitting.md").read_text()


def test_the_code_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict = {}
    exec(compile(source, "fitting.md", "exec"), names)
    assert names["images"].isfinite().all()
    assert names["predictor"].plan.nfe == 5


def test_the_command_writes_a_predictor_per_number_of_evaluations(tmp_path, tiny_model):
    save_model(tiny_model, tmp_path / "m.safetensors")
    options = ["--samples", "8", "--early", "0", "--late", "1", "--teacher-nfe", "4", "--starts", "1"]
    told = CliRunner().invoke(
        app, ["fit", "--model", f"{tmp_path}/m.safetensors", "--nfe", "2-3", *options, "--out", f"{tmp_path}/out"]
    )
    assert told.exit_code == 0, told.output
    for nfe in (2, 3):
        predictor = load_predictor(tmp_path / "out" / f"nfe{nfe}.safetensors")
        assert predictor.plan.nfe == nfe
        assert Sampler(tiny_model, predictor).run(1).images.isfinite().all()
