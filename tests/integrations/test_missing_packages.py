"""The packages of the integrations: their absence is explained, and the engine needs none of them."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from amed_engine import AmedError

ROOT = Path(__file__).resolve().parents[2]

ABSENT = {
    "amed_engine.integrations.diffusers": ("diffusers", "pip install 'amed-engine[diffusers]'"),
    "amed_engine.integrations.serving.litserve": ("litserve", "pip install 'amed-engine[litserve]'"),
    "amed_engine.integrations.serving.ray": ("ray", "pip install 'amed-engine[ray]'"),
    "amed_engine.serving.http": ("fastapi", "pip install 'amed-engine[serve]'"),
}


@pytest.mark.parametrize("module", ABSENT)
def test_a_missing_package_is_named_with_its_install_line(module, monkeypatch):
    package, line = ABSENT[module]
    for name in [name for name in sys.modules if name == module or name.startswith((module + ".", package + "."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(AmedError, match=re.escape(line)) as caught:
        importlib.import_module(module)
    assert isinstance(caught.value, ImportError)


def test_the_other_routes_need_no_package_and_the_engine_none_of_them():
    code = """
import sys
servers = ("fastapi", "litserve", "prometheus_client", "ray", "uvicorn")
for name in (*servers, "diffusers", "k_diffusion", "comfy", "physicsnemo", "transformers"):
    sys.modules[name] = None
import amed_engine
amed_engine.Sampler
assert not [name for name in sys.modules if name.startswith("amed_engine.integrations")]
from amed_engine.integrations import comfyui, k_diffusion, physicsnemo
from amed_engine.integrations.serving import triton
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd="/")


def test_vllm_omni_finds_the_scheduler_by_its_entry_point():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    (target,) = re.findall(r'"vllm_omni\.schedulers"\]\nAMEDScheduler = "([\w.:]+)"', text)
    module, name = target.split(":")
    assert getattr(importlib.import_module(module), name).__name__ == "AMEDScheduler"
