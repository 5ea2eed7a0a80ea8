"""The rows of the architecture: a package imports only from rows below its own, its files import each other in no circle."""

import ast
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from amed_engine import Sampler
from amed_engine.engine.graphs import GraphCache

ROOT = Path(__file__).resolve().parents[1]

# Bottom row first. What shares a row are strangers; kernels/ is installed as amed_engine.kernels.
ROWS = (
    {"kernels", "errors"},
    {"solvers"},
    {"sampling"},
    {"adapters", "networks"},
    {"checkpoints"},
    {"zoo"},
    {"engine"},
    {"datasets"},
    {"evaluation"},
    {"training", "serving", "metrics"},  # metrics: another name of evaluation.metrics
    {"integrations"},
    {"__init__"},  # the public names
    {"cli"},
    {"__main__"},
)
# Numbers and strict JSON, for hosts without torch; names of solvers, for the command line's help.
WITHOUT_TORCH = {
    *(
        f"amed_engine.engine.export.{name}"
        for name in ("tableau", "strict_json", "read_plan", "read_schedule", "stepper")
    ),
    *("amed_engine.solvers.files", "amed_engine.solvers.__init__"),
}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module, `__init__` spelled out."""
    homes = {"amed_engine": ROOT / "amed_engine", "amed_engine.kernels": ROOT / "kernels"}
    return {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]): path
        for package, folder in homes.items()
        for path in sorted(folder.rglob("*.py"))
    }


MODULES = modules()
SOURCES = {module: path.read_text("utf-8") for module, path in MODULES.items()}


def imported(source: str, module: str) -> set[str]:
    """Modules and names that the source of `module` imports, at any depth; `from a import b` is a.b if that is a module here,
    else a (spelled a.__init__ where a is a package of ours)."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {_home(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            # Of amed_engine itself only names are imported: what stands in a package is asked of the package.
            inner = (f"{base}.{alias.name}" for alias in node.names if base != "amed_engine")
            homes = {_home(name) for name in inner}
            found |= {name for name in homes if name in MODULES} or {_home(base)}
    return found


def _home(name: str) -> str:
    return f"{name}.__init__" if f"{name}.__init__" in MODULES else name


def head(module: str) -> str | None:
    """The entry of amed_engine/ that a module belongs to; None for one from outside."""
    first, *rest = module.split(".")
    return rest[0] if first == "amed_engine" and rest else None


def row(entry: str) -> int:
    return next((i for i, entries in enumerate(ROWS) if entry in entries), -1)


def violations(source: str, module: str) -> list[str]:
    """What the source of `module` imports although it stands in its own row or above."""
    own = head(module)
    targets = {(name, head(name)) for name in imported(source, module)}
    return sorted(
        f"{module} imports {name}, which does not stand below it"
        for name, target in targets
        if target is not None and target != own and not row(target) < row(own)
    )


def cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Circles of imports, each once for every way into it."""

    def walk(path: list[str]) -> Iterator[list[str]]:
        for name in sorted(graph.get(path[-1], ())):
            if name in path:
                yield [*path[path.index(name) :], name]
            elif name not in seen:
                yield from walk([*path, name])
        seen.add(path[-1])

    seen: set[str] = set()
    for start in sorted(graph):
        if start not in seen:
            yield from walk([start])


def forbidden(source: str, module: str) -> list[str]:
    """Imports that a package's own promise rules out."""
    names = imported(source, module)
    banned: tuple[str, ...] = ()
    if head(module) == "solvers":  # arithmetic on noise levels knows no network and no device
        banned = ("amed_engine.kernels", "amed_engine.networks", "torch.nn")
    elif head(module) == "kernels":  # nothing of diffusion
        banned = tuple(sorted(f"amed_engine.{name}" for entries in ROWS for name in entries - {"kernels"}))
    if module in WITHOUT_TORCH:
        banned = (*banned, "torch")
    found = [name for name in sorted(names) for ban in banned if name == ban or name.startswith(f"{ban}.")]
    nn = head(module) == "solvers" and re.search(r"torch import .*\bnn\b|torch\.nn\b", source)
    return [f"{module} imports {name}" for name in [*found, *(["torch.nn"] if nn else [])]]


def test_every_entry_has_a_row():
    unknown = {head(module) for module in MODULES} - set().union(*ROWS)
    assert not unknown, f"{sorted(unknown)} have no row; add them in {__file__}"
    top = {
        path.relative_to(ROOT / "amed_engine").parts
        for path in MODULES.values()
        if ROOT / "amed_engine" in path.parents
    }
    assert len([parts for parts in top if len(parts) == 1]) <= 3  # and py.typed
    assert len({parts[0] for parts in top if len(parts) > 1}) <= 14


def test_imports_go_down():
    assert not [v for module, source in SOURCES.items() for v in violations(source, module)]


def test_no_circle_inside_a_package():
    graph = {
        module: {name for name in imported(source, module) if name in MODULES and head(name) == head(module)} - {module}
        for module, source in SOURCES.items()
    }
    assert not list(cycles(graph))


def test_packages_keep_their_promises():
    assert not [v for module, source in SOURCES.items() for v in forbidden(source, module)]
    assert set(MODULES) > WITHOUT_TORCH


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("amed_engine.sampling.loop", "from amed_engine.solvers.base import Solver", True),
        ("amed_engine.solvers.base", "from amed_engine.sampling.loop import sample", False),
        ("amed_engine.solvers.base", "from amed_engine import sampling", False),
        ("amed_engine.solvers.base", "from ..sampling import loop", False),
        ("amed_engine.solvers.base", "def f():\n    import amed_engine.sampling.loop", False),
        ("amed_engine.solvers.base", "import amed_engine", False),
        ("amed_engine.solvers.base", "from amed_engine import Sampler", False),
        ("amed_engine.solvers.base", "from amed_engine.solvers.stage import Stage", True),
        ("amed_engine.networks.precond", "from .layers import Conv2d", True),
        ("amed_engine.networks.precond", "from ..sampling.denoiser import Denoised", True),
        ("amed_engine.networks.precond", "from amed_engine.adapters import wrap", False),  # a sibling
        ("amed_engine.networks.__init__", "from ..zoo import load", False),
        ("amed_engine.engine.export.write", "from amed_engine.engine.sampler import Sampler", True),
        ("amed_engine.cli.__init__", "import amed_engine", True),
        ("amed_engine.__init__", "from amed_engine.engine.sampler import Sampler", True),
        ("amed_engine.errors", "import torch", True),
    ],
)
def test_the_checker_tells_a_wrong_import_from_a_right_one(module, source, allowed):
    assert (violations(source, module) == []) is allowed


@pytest.mark.parametrize(
    ("graph", "circles"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, 0),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, 0),
        ({"a": {"b"}, "b": {"a"}}, 1),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, 1),
    ],
)
def test_the_checker_finds_circles(graph, circles):
    assert len(list(cycles(graph))) == circles


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("amed_engine.solvers.rules", "import torch\nfrom torch import Tensor", True),
        ("amed_engine.solvers.rules", "from amed_engine.kernels import combine", False),
        ("amed_engine.solvers.rules", "from torch import Tensor, nn", False),
        ("amed_engine.solvers.rules", "import torch\nx = torch.nn.Linear", False),
        ("amed_engine.solvers.rules", "from torch.nn.functional import silu", False),
        ("amed_engine.solvers.__init__", "from torch import Tensor", False),
        ("amed_engine.solvers.__init__", "import amed_engine.kernels", False),
        ("amed_engine.solvers.files", "import torch", False),
        ("amed_engine.kernels.ops", "from .layout import hand_over", True),
        ("amed_engine.kernels.ops", "from amed_engine.errors import ConfigError", False),
        ("amed_engine.kernels.ops", "from ..solvers import rules", False),
        ("amed_engine.engine.export.stepper", "import numpy", True),
        ("amed_engine.engine.export.stepper", "import torch", False),
        ("amed_engine.engine.export.tableau", "def f():\n    from torch import Tensor", False),
    ],
)
def test_the_checker_knows_each_promise(module, source, allowed):
    assert (forbidden(source, module) == []) is allowed


def test_a_file_beside_the_packages_is_seen():
    assert row("loop") == -1


def names_the_extension(module: str, source: str) -> bool:
    """Whether a file other than kernels/native.py speaks of the compiled extension, which is imported by name."""
    return module != "amed_engine.kernels.native" and "_native" in source


def test_only_native_knows_the_extension():
    assert "_native" in SOURCES["amed_engine.kernels.native"]
    assert not [module for module, source in SOURCES.items() if names_the_extension(module, source)]
    assert names_the_extension("amed_engine.kernels.ops", 'importlib.import_module("amed_engine._native")')


def files_from_run_to(denoiser_frame) -> list[str]:
    """Files of amed_engine/ on the stack between `Sampler.run` and a denoiser that it called, each once, outermost first."""
    frames = [frame.f_code for frame, _ in traceback.walk_stack(denoiser_frame)][::-1]
    start = next(i for i, code in enumerate(frames) if code is Sampler.run.__code__)
    files = [Path(code.co_filename) for code in frames[start:]]
    package = ROOT / "amed_engine"
    return list(dict.fromkeys(file.relative_to(package).as_posix() for file in files if package in file.parents))


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_few_files_lie_between_the_user_and_the_loop(double, captured):
    """What the loop itself calls, to ask the network, lies below it."""
    seen = []

    def denoiser(x, sigma):
        seen.append(files_from_run_to(sys._getframe()))
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    sampler = Sampler(denoiser, solver="ipndm", nfe=3, shape=(1, 4, 4), sigma_min=0.002, sigma_max=80.0)
    if captured:
        sampler._runner.cache = GraphCache(double, (1,), None, warmups=1)
    assert sampler.run(1).backend == ("graph" if captured else "eager")
    graphs = ["engine/graphs.py"] if captured else []  # and engine/capture.py, for which the double stands
    way = ["engine/sampler.py", "engine/runner.py", *graphs, "sampling/loop.py", "engine/model.py"]
    assert seen
    assert seen == [way] * len(seen)


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
