"""Paths that README.md, CHANGELOG.md and docs/ have named stay importable: a row may be added, never removed."""

import ast
import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import amed_engine
from amed_engine import AmedError

# Module -> names that pages take from it.
NAMES = {
    "amed_engine": (
        *("AMEDPredictor", "ConfigError", "Sampler", "Stepper", "UnsafeFileError", "adapters", "calibrate"),
        *("convert", "distill"),
        *("fit", "from_pretrained", "get_cmake_dir", "get_include", "get_library", "get_pkgconfig_dir", "kernels"),
        *("load", "load_package", "load_predictor", "make_plan", "metrics", "read_plan", "read_schedule"),
        *("save_predictor", "save_pretrained", "search_schedule", "wrap", "write_plan", "write_schedule"),
    ),
    "amed_engine.adapters": (
        *("EDM", "ClassifierFree", "ClassifierGuided", "Flux", "Thresholded"),
        *("decode_latents", "flow_levels", "load_onnx", "save_package", "shift_of", "wrap_pipeline"),
    ),
    "amed_engine.checkpoints": ("load_first_stage",),
    "amed_engine.evaluation": ("evaluate",),
    "amed_engine.integrations": ("comfyui", "cupy", "k_diffusion", "physicsnemo"),
    "amed_engine.integrations.comfyui": ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"),
    "amed_engine.integrations.comfyui.webui": ("sampler_entry", "schedule"),
    "amed_engine.integrations.cupy": ("stepper",),
    "amed_engine.integrations.diffusers": ("AMEDPipeline", "AMEDScheduler"),
    "amed_engine.integrations.k_diffusion": ("sample_amed",),
    "amed_engine.integrations.physicsnemo": ("AMEDSolver", "Midpoint"),
    "amed_engine.integrations.serving.litserve": ("AMEDAPI",),
    "amed_engine.integrations.serving.ray": ("AMEDDeployment", "build"),
    "amed_engine.integrations.serving.triton": ("write_repository",),
    "amed_engine.integrations.serving.tritonserver": ("main",),
    "amed_engine.kernels": ("backends", "combine", "use"),
    "amed_engine.metrics": (
        *("Distances", "class_accuracy", "frechet", "gather", "generate"),
        *("per_image_rmse", "precision_recall", "read_features"),
    ),
    "amed_engine.metrics.train_classifier": ("main",),
    "amed_engine.networks": ("OpenAIClassifier",),
    "amed_engine.serving.http": ("Limits", "make_app"),
    "amed_engine.zoo": ("bundled_predictor", "published"),
    "amed_engine.zoo.train_digits": ("main",),
}
# Run as `python -m`.
COMMANDS = (
    "amed_engine",
    "amed_engine.integrations.serving.litserve",
    "amed_engine.integrations.serving.tritonserver",
    "amed_engine.metrics.train_classifier",
    "amed_engine.zoo.train_digits",
)
# Module -> the library that it cannot be imported without.
NEEDS = {
    "amed_engine.integrations.diffusers": "diffusers",
    "amed_engine.integrations.serving.litserve": "litserve",
    "amed_engine.integrations.serving.ray": "ray",
    "amed_engine.serving.http": "fastapi",
}


def is_missing(module: str) -> bool:
    return module in NEEDS and find_spec(NEEDS[module]) is None


@pytest.mark.usefixtures("off_checkout")
@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_they_were_documented(module):
    if is_missing(module):
        with pytest.raises(AmedError, match=f"needs {NEEDS[module]}.*pip install"):
            importlib.import_module(module)
        return
    imported = importlib.import_module(module)
    assert [name for name in NAMES[module] if not has(imported, name)] == []


def has(module, name: str) -> bool:
    """Whether `from module import name` works, which finds submodules too."""
    return hasattr(module, name) or find_spec(f"{module.__name__}.{name}") is not None


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_are_where_they_were_documented(module):
    done = subprocess.run([sys.executable, "-P", "-m", module, "--help"], capture_output=True, text=True)
    if is_missing(module):
        assert re.search(f"needs {NEEDS[module]}.*pip install", done.stderr)
    else:
        assert (done.returncode, done.stdout[:7]) == (0, "Usage: "), done.stderr


def test_type_checkers_see_the_names_that_are_imported_on_first_use():
    """`X as X`, since what a typed package imports without "as" is its own; from where X is imported at run time."""
    tree = ast.parse(Path(amed_engine.__file__).read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    seen = {alias.asname: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    assert seen == {name: f"amed_engine.{home}.{name}" for name, home in amed_engine._HOME.items()}
