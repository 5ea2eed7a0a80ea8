"""What setup.py asks nvcc for: a compiler that takes notes, and where there is one the real compiler."""

import ctypes
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
CUDA = {"csrc/cuda/combine.cu", "csrc/cuda/midpoint.cu"}
TARGETS = ["amed_engine/kernels/amed_cuda.so", "amed_engine/csrc/lib/libamed.so"]

# Keeps its command line, and has g++ build what is plain C++ in it with nvcc's options spelled for g++.
NOTES = """#!{python}
import json, os, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    print(json.dumps(words), file=log)
if {broken}:
    sys.exit("nvcc fatal : Unsupported gpu architecture")
spelled = []
for word in words:
    if word.startswith("-Xcompiler="):
        spelled += word.partition("=")[2].split(",")
    elif word.startswith("-Xlinker="):
        spelled.append("-Wl," + word.partition("=")[2])
    elif not word.startswith(("-gencode", "-cudart", "-O")) and not word.endswith(".cu"):
        spelled.append(word)
os.execvp("g++", ["g++", "-O0", "-x", "c++", *spelled, "-xc++", os.devnull])
"""


@pytest.fixture
def build(monkeypatch, tmp_path):
    """The build_ext of setup.py without the Python extension, which other tests compile."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("AMED_CUDA", "1")
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    runpy.run_path("setup.py")
    command = given["cmdclass"]["build_ext"](setuptools.Distribution({"ext_modules": []}))
    command.ensure_finalized()
    command.inplace, command.build_lib, command.build_temp = False, str(tmp_path / "lib"), str(tmp_path / "temp")
    return command


def compiler(tmp_path, monkeypatch, broken: bool = False) -> Path:
    """The note-taking nvcc, first on the path; what it writes to."""
    program, log = tmp_path / "bin" / "nvcc", tmp_path / "commands.jsonl"
    program.parent.mkdir()
    program.write_text(NOTES.format(python=sys.executable, log=str(log), broken=broken))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return log


def sources(words: list[str]) -> set[str]:
    return {word for word in words if word.endswith((".cu", ".cpp"))}


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++")
def test_nvcc_is_asked_for_both_libraries(build, tmp_path, monkeypatch):
    log = compiler(tmp_path, monkeypatch)
    build.run()
    kernels, library = map(json.loads, log.read_text().splitlines())
    for words, target in ((kernels, TARGETS[0]), (library, TARGETS[1])):
        assert words[words.index("-o") + 1] == str(tmp_path / "lib" / target)
        assert [w for w in words if w.startswith("-gencode")] == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90,code=sm_90",
        ]
        assert {"-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static", "-Icsrc/include"} <= set(words)
    assert sources(kernels) == CUDA
    host = {str(p.relative_to(ROOT)) for part in ("library", "cpu") for p in (ROOT / "csrc" / part).glob("*.cpp")}
    assert sources(library) == CUDA | {"csrc/library/cuda_device.cu"} | host
    assert {"-DAMED_WITH_CUDA", "-Xcompiler=-fopenmp,-fvisibility=hidden"} <= set(library)
    assert "-DAMED_WITH_CUDA" not in kernels


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++")
def test_its_link_options_hide_everything_but_the_c_api(build, tmp_path, monkeypatch):
    """As the host linker understands them; the device's part is missing from what g++ makes here."""
    compiler(tmp_path, monkeypatch)
    build.run()
    check_symbols(tmp_path / "lib" / TARGETS[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the library is built on Linux")
def test_a_failing_nvcc_is_a_warning(build, tmp_path, monkeypatch, capfd):
    compiler(tmp_path, monkeypatch, broken=True)
    build.run()
    said = capfd.readouterr().err
    assert "Unsupported gpu architecture" in said
    assert [f"warning: {Path(target).name} was not built by nvcc" in said for target in TARGETS] == [True, True]
    assert not list((tmp_path / "lib").rglob("*.so"))


@pytest.mark.parametrize("decided", ["0", None])
def test_without_a_gpu_nvcc_is_left_alone(build, tmp_path, monkeypatch, decided):
    log = compiler(tmp_path, monkeypatch)
    monkeypatch.delenv("AMED_CUDA")
    if decided:
        monkeypatch.setenv("AMED_CUDA", decided)
    elif shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU")
    monkeypatch.setattr(type(build), "build_library", lambda self, nvcc: None if nvcc is None else pytest.fail(nvcc))
    build.run()
    assert not log.exists()


@pytest.mark.gpu  # takes minutes; machines with a GPU are those that build it
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nvcc") is None, reason="no nvcc")
def test_the_real_nvcc_makes_a_library_with_cuda(build, tmp_path):
    """It loads, and says that it has CUDA."""
    build.build_library(shutil.which("nvcc"))
    path = tmp_path / "lib" / TARGETS[1]
    check_symbols(path)
    assert ctypes.CDLL(str(path)).amed_has_cuda() == 1


def check_symbols(path: Path) -> None:
    """The name that programs link to, and nothing visible but what amed.h and cuda.h declare."""
    headers = "".join((ROOT / "csrc/include/amed" / name).read_text() for name in ("amed.h", "cuda.h", "cpu.h"))
    read = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert re.search(r"SONAME.*\[libamed\.so\]", read)
    listed = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True)
    names = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    assert "amed_sampler_create_cuda" in names
    assert {name for name in names if name not in headers} == set()
