"""What pip would install: built from the tracked files without compilers or torch, complete, and running on its own."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

# Of the repository, not of a release.
ONLY_HERE = (".ci/", ".gitignore", ".pre-commit-config.yaml")
# What the build writes into a source distribution by itself.
MADE = ("PKG-INFO", "setup.cfg", "amed_engine.egg-info/")

# In a process that has no torch: the build must not ask for it.
BUILD = """
import sys
sys.modules["torch"] = None
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""

# Every module of the package, where nothing is installed but its dependencies and theirs.
IMPORT_ALL = """
import importlib, importlib.abc, pkgutil, re, sys
from importlib import metadata

def closure(name, seen):
    if name not in seen:
        seen.add(name)
        for line in metadata.requires(name) or ():
            if "extra ==" not in line:
                dependency = re.match(r"[\\w.-]+", line)[0].lower().replace("_", "-")
                try:
                    closure(dependency, seen)
                except metadata.PackageNotFoundError:
                    pass
    return seen

core = closure("amed-engine", set())
homes = metadata.packages_distributions()
optional = {root for root, owners in homes.items() if not core & {o.lower().replace("_", "-") for o in owners}}
optional -= {"setuptools", "pkg_resources", "_distutils_hack"}  # torch imports them where they are

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in optional:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
import amed_engine
for module in pkgutil.walk_packages(amed_engine.__path__, "amed_engine.", onerror=lambda name: None):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except Exception as error:
        if not re.search(r"amed-engine\\[|the nodes run inside ComfyUI", str(error)):
            print(f"{module.name}: {type(error).__name__}: {error}")
"""


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)


def tracked() -> set[str]:
    done = (
        run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
        if (ROOT / ".git").exists()
        else None
    )
    if done is None or done.returncode:
        pytest.skip("not a git checkout")
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


def build(kind: str, source: Path, target: Path) -> Path:
    target.mkdir()
    # No compiler is found: neither by name nor by path.
    nowhere = {"PATH": str(target), "CC": "no-compiler", "CXX": "no-compiler"}
    done = run(sys.executable, "-c", BUILD, kind, target, cwd=source, env={**os.environ, **nowhere})
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """From the tracked files alone: what lies about in a checkout cannot stand in for one that was forgotten."""
    if find_spec("setuptools") is None or find_spec("pybind11") is None:
        pytest.skip("needs setuptools and pybind11")
    folder = tmp_path_factory.mktemp("build")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    return build("sdist", folder / "source", folder / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """From the source distribution, as pip builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / f"amed_engine-{VERSION}", folder / "wheel")


def test_the_source_distribution_is_the_repository(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    released = {name for name in tracked() if not name.startswith(ONLY_HERE)}
    assert released - names == set(), "add a pattern to MANIFEST.in"
    assert {name for name in names - released if not name.startswith(MADE)} == set()


def test_the_wheel_holds_every_file_of_the_package(wheel):
    homes = {"amed_engine/": "amed_engine/", "kernels/": "amed_engine/kernels/", "csrc/": "amed_engine/csrc/"}
    expected = {
        home + name.removeprefix(folder)
        for name in tracked()
        for folder, home in homes.items()
        if name.startswith(folder) and not name.startswith("csrc/tests/")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert expected - names == set(), "add a pattern to package-data in pyproject.toml"
    assert {name for name in names - expected if ".dist-info/" not in name} == set()


def test_the_index_would_take_both(sdist, wheel):
    if find_spec("twine") is None:
        pytest.skip("needs twine")
    done = run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    assert done.returncode == 0, done.stdout


def test_the_wheel_runs_where_it_is_installed(wheel, tmp_path):
    """Away from the checkout, without the extension: the bundled model draws."""
    installed = tmp_path / "installed"
    done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", installed, wheel)
    assert done.returncode == 0, done.stderr
    code = (
        "import amed_engine, torch; torch.set_num_threads(1); from amed_engine import kernels; print(amed_engine.__file__);"
        "print(kernels.backends()['cpu'], tuple(amed_engine.Sampler('digits').run([0]).images.shape))"
    )
    # -S: no .pth files, so the finder of an editable installation stays out of it.
    paths = os.pathsep.join([str(installed), *(path for path in sys.path if path.endswith("-packages"))])
    done = run(sys.executable, "-S", "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(installed / "amed_engine" / "__init__.py"), "reference (1, 1, 8, 8)"]


def test_every_module_imports_without_the_extras_or_names_the_one_it_needs(tmp_path):
    done = run(sys.executable, "-c", IMPORT_ALL, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
