"""What setup.py asks nvcc for: a compiler that takes notes, and where there is one the real compiler."""

import ctypes
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import setuptools
import torch

from amed_engine import sample
from amed_engine.engine.export.write_plan import make_tableau
from amed_engine.kernels import cuda

ROOT = Path(__file__).resolve().parents[2]
CUDA, DEVICE = {"csrc/cuda/combine.cu", "csrc/cuda/midpoint.cu"}, "csrc/library/cuda_device.cu"
TARGETS = ["amed_engine/kernels/amed_cuda.so", "amed_engine/csrc/lib/libamed.so"]

needs_gcc = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++")

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
    elif not word.startswith(("-gencode", "-cudart", "-O", "--threads")) and not word.endswith(".cu"):
        spelled.append(word)
os.execvp("g++", ["g++", "-O0", *spelled, "-xc++", os.devnull])
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


def library_without_building(build, monkeypatch) -> list[list[str]]:
    """What objects of the CUDA part the C library would be made with."""
    given = []
    monkeypatch.setattr(type(build), "build_library", lambda self, library, device: given.append(device))
    return given


def sources(words: list[str]) -> set[str]:
    return {word for word in words if word.endswith((".cu", ".cpp"))}


@needs_gcc
def test_nvcc_compiles_every_source_once(build, tmp_path, monkeypatch):
    """And the host's linker, which understands its options for it, hides everything but the C API."""
    log = compiler(tmp_path, monkeypatch)
    build.run()
    *compiled, kernels, library = map(json.loads, log.read_text().splitlines())
    assert [sources(words) for words in compiled] == [{source} for source in sorted({*CUDA, DEVICE})]
    for words in compiled:
        assert [w for w in words if w.startswith("-gencode")] == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        ]
    for words, target, parts in ((kernels, TARGETS[0], CUDA), (library, TARGETS[1], {*CUDA, DEVICE})):
        assert words[words.index("-o") + 1] == str(tmp_path / "lib" / target)
        assert {"-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static"} <= set(words)
        assert {w for w in words if w.endswith(".o")} == {str(tmp_path / "temp" / f"{part}.o") for part in parts}
    host = {str(p.relative_to(ROOT)) for part in ("library", "cpu") for p in (ROOT / "csrc" / part).glob("*.cpp")}
    assert sources(library) == host
    assert {"-DAMED_WITH_CUDA", "-Xcompiler=-fopenmp,-fvisibility=hidden"} <= set(library)
    assert "-DAMED_WITH_CUDA" not in kernels
    check_symbols(tmp_path / "lib" / TARGETS[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA part is built on Linux")
def test_a_failing_nvcc_is_a_warning_and_costs_only_the_cuda_part(build, tmp_path, monkeypatch, capfd):
    compiler(tmp_path, monkeypatch, broken=True)
    monkeypatch.setenv("AMED_CUDA", "")
    given = library_without_building(build, monkeypatch)
    build.run()
    said = capfd.readouterr().err
    assert "Unsupported gpu architecture" in said
    assert "warning: the CUDA part was not built" in said
    assert given == [[]], "the C library of the CPU is built all the same"
    assert not list((tmp_path / "lib").rglob("*.so"))


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA part is built on Linux")
def test_who_insists_on_cuda_is_not_given_less(build, tmp_path, monkeypatch, found):
    """A broken nvcc, and none."""
    compiler(tmp_path, monkeypatch, broken=True)
    if not found:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="AMED_CUDA=1 insists on the CUDA part, which was not built"):
        build.run()


@pytest.mark.parametrize("decided", ["0", None])
@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA part is built on Linux")
def test_without_nvcc_or_where_forbidden_only_the_cpu_is_served(build, tmp_path, monkeypatch, decided):
    log, given = compiler(tmp_path, monkeypatch), library_without_building(build, monkeypatch)
    monkeypatch.delenv("AMED_CUDA")
    if decided:
        monkeypatch.setenv("AMED_CUDA", decided)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    older = tmp_path / "lib" / TARGETS[0]
    older.parent.mkdir(parents=True)
    older.touch()
    build.run()
    assert not log.exists()
    assert given == [[]]
    assert not older.exists(), "of other sources"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nvcc") is None, reason="no nvcc")
def test_the_real_nvcc_makes_both_libraries(build, tmp_path, tools, open_library):
    """The C API with CUDA samples on the CPU as without; where no driver is, both say so and go on."""
    build.run()
    check_symbols(tmp_path / "lib" / TARGETS[1])
    library, program, x = open_library(str(tmp_path / "lib" / TARGETS[1])), tools.program("ipndm"), tools.latents()
    assert library.raw.amed_has_cuda() == 1
    text = make_tableau(program).dumps()
    got = library.sample(text, x.numpy(), lambda points, sigma: (tools.on_numpy(points, sigma), None))
    np.testing.assert_array_equal(got, sample(tools.denoise, x, tools.SIGMAS, program.solver).numpy())
    if torch.cuda.is_available():
        return
    with pytest.raises(Exception, match=r"allocating: .*(driver|device)") as caught:
        library.call("sampler_create_cuda", library.parse(text), 1, 1, None, ctypes.byref(ctypes.c_void_p()))
    assert caught.value.status == 7
    kernels = ctypes.CDLL(str(tmp_path / "lib" / TARGETS[0]))
    args = cuda.CombineArgs(sources=1, outputs=1, batch=1, size=8)
    assert kernels.amed_cuda_combine(ctypes.byref(args), None) > 0


def check_symbols(path: Path) -> None:
    """The name that programs link to, and nothing visible but what amed.h declares."""
    header = (ROOT / "csrc/include/amed/amed.h").read_text()
    read = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert re.search(r"SONAME.*\[libamed\.so\]", read)
    listed = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True)
    names = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    assert "amed_sampler_create_cuda" in names
    assert {name for name in names if name not in header} == set()
