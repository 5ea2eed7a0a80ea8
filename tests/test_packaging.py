"""What a release would ship: one version, every source, and nothing that runs code found in a file."""

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from setuptools.command.egg_info import FileList

import amed_engine

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# One-line calls that can run code from a file. A read with weights_only=True is the one safe form of torch.load.
UNSAFE = re.compile(
    r"(pickle|joblib|dill)\.loads?\(|weights_only\s*=\s*False|torch\.load\((?!.*weights_only\s*=\s*True)"
    r"|yaml\.load\(|(?<![.\w])(eval|exec)\(|extractall\("
)


def tracked() -> list[Path]:
    """The files under version control, or those about to be; skips where the tree is not a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.splitlines() if (ROOT / name).is_file()]


def test_one_version():
    assert amed_engine.__version__ == PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [PROJECT["version"]]
    assert metadata.version("amed-engine") == PROJECT["version"], "installed from an older tree; run make test"


def test_the_source_distribution_holds_every_source(monkeypatch):
    monkeypatch.chdir(ROOT)
    manifest = FileList()
    for line in Path("MANIFEST.in").read_text("utf-8").splitlines():
        manifest.process_template_line(line)
    folders = ("amed_engine", "kernels", "csrc", "benchmarks", "tests")
    sources = {str(p.relative_to(ROOT)) for p in tracked() if p.relative_to(ROOT).parts[0] in folders}
    assert {source.partition("/")[0] for source in sources} == set(folders)
    assert sources - set(manifest.files) == set(), "add a pattern to MANIFEST.in"


def test_every_folder_of_the_package_is_a_package():
    """`find_packages` leaves out, without a word, a folder that has no __init__.py."""
    folders = {path.parent for path in (ROOT / "amed_engine").rglob("*.py")}
    assert len(folders) > 5
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock", "requirements-integrations.lock"])
def test_locks_pin_exact_versions(name):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text("utf-8").splitlines()]
    loose = [
        line for line in lines if line and not line.startswith("-r ") and not re.match(r"[\w.-]+==[\w.]+(;|$)", line)
    ]
    assert lines
    assert not loose


@pytest.mark.parametrize(
    ("line", "unsafe"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("pickle.load(file)", True),
        ("eval(text)", True),
        ("model.eval()", False),
        ("archive.extractall(folder)", True),
    ],
)
def test_the_pattern_tells_unsafe_reads(line, unsafe):
    assert bool(UNSAFE.search(line)) is unsafe


def test_no_file_read_by_the_package_can_run_code():
    files = [path for folder in ("amed_engine", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 50
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if UNSAFE.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_path_of_one_machine():
    machine = re.compile("/" + r"(work|root|home|Users)/\w")
    assert machine.search("/" + "home/someone")
    texts = [
        p for p in tracked() if p.suffix in {".py", ".md", ".toml", ".json", ".h", ".cpp", ".cu", ".yaml", ".lock"}
    ]
    assert [str(path) for path in texts if machine.search(path.read_text("utf-8"))] == []
