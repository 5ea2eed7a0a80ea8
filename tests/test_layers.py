"""The import order of the project: a file imports only what stands above it, and the parts stay strangers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# One direction, top to bottom. A package is one unit: inside it any order will do.
ENGINE = (
    "kernels",
    *("errors", "locations", "static_plan", "plan_file", "stepper"),
    *("schedule", "program", "rules"),  # arithmetic on noise levels, and data
    *("solver", "singlestep", "multistep", "nonstationary", "solvers", "plan", "seeds"),
    *("denoiser", "loop", "coefficients", "predictor"),
    *("networks", "adapters", "checkpoints", "zoo"),
    *("models", "arrays", "requests", "batches", "planning", "results", "capture", "graph", "engine"),
    *("packages", "expression", "export_plan", "export_schedule", "export", "sampler"),
    *("candidate", "fitting", "learned", "distillation", "schedule_search", "schedule_file", "images", "reproduce"),
    "__init__",  # the public names
    *("integrations", "metrics", "compare", "evaluation", "figure"),
    *("environment", "console", "commands", "cli"),
    "__main__",
)
KERNELS = (
    *("reference", "layout", "native"),
    *("triton_combine", "triton_midpoint", "triton_backend", "cuda"),
    *("ops", "__init__"),
)

PACKAGES = {"amed_engine": (ROOT / "amed_engine", ENGINE), "amed_engine.kernels": (ROOT / "kernels", KERNELS)}


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package, `__init__` spelled out."""
    folder, _ = PACKAGES[package]
    return {".".join([package, *p.relative_to(folder).with_suffix("").parts]): p for p in sorted(folder.rglob("*.py"))}


def imported(source: str, module: str) -> set[str]:
    """Dotted names that the source of `module` imports, at any depth, relative ones resolved.

    `from a import b` counts as `a.b`, whether b is a module or a name: only prefixes of it are ever compared.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def unit(name: str, package: str) -> str | None:
    """The entry of the package's order that a dotted name belongs to; None for a name from outside."""
    if name != package and not name.startswith(package + "."):
        return None
    _, order = PACKAGES[package]
    head = name[len(package) + 1 :].partition(".")[0]
    return head if head in order else "__init__"


def violations(source: str, module: str, package: str) -> list[str]:
    """What the source of `module` imports from its own package although it does not stand above it."""
    _, order = PACKAGES[package]
    own = unit(module, package)
    targets = {(name, unit(name, package)) for name in imported(source, module)} - {(module, own)}
    return sorted(
        f"{module} imports {name}, which stands below it"
        for name, target in targets
        if target is not None and target != own and order.index(target) > order.index(own)
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_has_a_place_in_the_order(package):
    folder, order = PACKAGES[package]
    unknown = {name[len(package) + 1 :].partition(".")[0] for name in modules(package)} - set(order)
    assert not unknown, f"{sorted(unknown)} of {folder.name}/ have no place in the import order; add them in {__file__}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    found = [v for name, path in modules(package).items() for v in violations(path.read_text("utf-8"), name, package)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("amed_engine.loop", "from amed_engine.solver import Solver", True),
        ("amed_engine.solver", "from amed_engine.loop import sample", False),
        ("amed_engine.solver", "from amed_engine import loop", False),
        ("amed_engine.solver", "from . import loop", False),
        ("amed_engine.solver", "def f():\n    import amed_engine.loop", False),
        ("amed_engine.solver", "import amed_engine", False),
        ("amed_engine.solver", "from amed_engine import Sampler", False),
        ("amed_engine.networks.precond", "from .layers import Conv2d", True),
        ("amed_engine.networks.precond", "from ..loop import sample", True),
        ("amed_engine.networks.precond", "from ..zoo.digits import load", False),
        ("amed_engine.networks.__init__", "from ..zoo import load", False),
        ("amed_engine.cli", "import amed_engine", True),
        ("amed_engine.__init__", "from amed_engine.sampler import Sampler", True),
        ("amed_engine.errors", "import torch", True),
    ],
)
def test_the_checker_tells_a_wrong_import_from_a_right_one(module, source, allowed):
    assert (violations(source, module, "amed_engine") == []) is allowed


def test_kernels_know_nothing_of_the_engine():
    names = {
        (module, name)
        for module, path in modules("amed_engine.kernels").items()
        for name in imported(path.read_text("utf-8"), module)
        if name.startswith("amed_engine") and not name.startswith(("amed_engine.kernels", "amed_engine._native"))
    }
    assert not names


def test_only_native_knows_the_extension():
    users = {
        module
        for package in PACKAGES
        for module, path in modules(package).items()
        if any("_native" in name.split(".") for name in imported(path.read_text("utf-8"), module))
    }
    assert users <= {"amed_engine.kernels.native"}


def test_csrc_is_free_of_frameworks():
    """No torch, Python only in bindings.cpp, so that another stack can link the rest; examples are of that other stack."""
    torch_header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    python_header = re.compile(r'#\s*include\s*[<"](Python\.h|pybind11/)')
    examples = ROOT / "csrc" / "examples"
    for path in sorted((ROOT / "csrc").rglob("*")):
        if examples not in path.parents and path.suffix in {".h", ".hpp", ".cpp", ".cu", ".cuh"}:
            text = path.read_text("utf-8")
            assert not torch_header.search(text), f"{path} includes a header of torch"
            assert path.name == "bindings.cpp" or not python_header.search(text), f"{path} includes a header of Python"


def test_the_command_line_starts_without_torch():
    code = "import sys, amed_engine.cli; sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
