"""csrc/ compiles strictly: C++ under the sanitizers, CUDA for three architectures, and at run time through NVRTC."""

import ctypes
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amed_engine import kernels
from amed_engine.kernels import cuda

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
STRICT = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CSRC / 'include'}"]

ARCHITECTURES = [80, 90, 100]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def run(command, **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result.stdout + result.stderr


@needs_compiler
@pytest.mark.parametrize(
    "clones", [pytest.param(True, id="dispatched", marks=pytest.mark.slow), pytest.param(False, id="portable")]
)
def test_unit_tests_under_the_sanitizers(tmp_path, clones):
    """Also without the clones for newer processors, so that the code every processor can run is tested."""
    program = tmp_path / "test_kernels"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g", "-fopenmp"]
    sources = [*CSRC.glob("tests/*.cpp"), *CSRC.glob("cpu/*.cpp")]
    run([COMPILER, *STRICT, *sanitizers, *([] if clones else ["-DAMED_NO_CLONES"]), *sources, "-o", program])
    assert run([program], timeout=300).strip().endswith("ok")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_unit_tests_of_the_cuda_sources_under_the_sanitizers(tmp_path):
    """The same tests and sanitizers, the kernels' threads run in turns on the CPU."""
    program = tmp_path / "test_kernels"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g", "-DAMED_TEST_CUDA"]
    compiler = [sys.executable, CSRC / "tests" / "emulated" / "nvcc.py"]
    run([*compiler, *STRICT, *sanitizers, *CSRC.glob("cuda/*.cu"), *CSRC.glob("tests/*.cpp"), "-o", program])
    assert run([program], timeout=300).strip().endswith("ok")


@needs_compiler
def test_bindings_compile_without_a_warning(tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    from sysconfig import get_paths

    includes = [f"-isystem{path}" for path in (pybind11.get_include(), get_paths()["include"])]
    run([COMPILER, *STRICT, *includes, "-O0", "-fsyntax-only", CSRC / "bindings.cpp"])


@needs_compiler
def test_python_mirrors_the_structures(tmp_path):
    """Sizes and last offsets of the structures that `cuda.py` fills."""
    fields = [
        ("CombineArgs", "wide"),
        ("DotArgs", "result"),
        ("MidpointArgs", "frequencies"),
        ("MidpointArgs", "result"),
    ]
    prints = "".join(f'std::printf("%zu %zu\\n", sizeof({s}), offsetof({s}, {f}));' for s, f in fields)
    main = f"int main() {{ using namespace amed; {prints} }}"
    (tmp_path / "sizes.cpp").write_text(f'#include <cstddef>\n#include <cstdio>\n#include "amed/cuda.h"\n{main}')
    run([COMPILER, *STRICT, "-Wno-invalid-offsetof", tmp_path / "sizes.cpp", "-o", tmp_path / "sizes"])
    lines = run([tmp_path / "sizes"]).split("\n")
    for line, (structure, field) in zip(lines, fields, strict=False):
        mirror = getattr(cuda, structure)
        assert line == f"{ctypes.sizeof(mirror)} {getattr(mirror, field).offset}", (structure, field)


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["combine", "midpoint"])
def test_cuda_compiles_without_spills(tmp_path, name, architecture):
    cubin = tmp_path / f"{name}.cubin"
    options = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", "-Werror=all-warnings"]
    log = run(["nvcc", *options, f"-I{CSRC / 'include'}", "-o", cubin, CSRC / "cuda" / f"{name}.cu"])
    entries = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL)
    assert len(entries) == {"combine": 10, "midpoint": 2}[name]
    assert re.findall(r"(\d+) bytes spill", log)
    assert not any(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    for kernel, registers in entries:
        # 256 threads a block: 128 registers leave two blocks on a processor, 64 leave four.
        limit = 64 if kernel in ("amed_combine_float_1", "amed_combine_float_2", "amed_midpoint_float") else 255
        assert int(registers) <= limit, (kernel, registers)
    if find_spec("triton"):
        sass = run([Path(find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump", "-sass", cubin])
        bodies = dict(re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", sass, re.DOTALL))
        assert bodies.keys() == {kernel for kernel, _ in entries}
        for kernel, body in bodies.items():
            assert "LDG.E.128" in body, "aligned rows are read 16 bytes at a time"
            assert "STG.E.128" in body or not kernel.startswith("amed_combine"), "and written so"


def nvrtc():
    """NVRTC of an installed CUDA package or toolkit; skips where there is none."""
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        spec = find_spec(package) if find_spec("nvidia") else None
        for root in spec.submodule_search_locations or [] if spec else []:
            for path in Path(root).glob("lib/libnvrtc.so.*"):
                for part in path.parent.glob("libnvrtc-builtins.so.*"):  # which it asks for by its bare name
                    ctypes.CDLL(str(part))
                return ctypes.CDLL(str(path))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("no NVRTC library")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["combine", "midpoint"])
def test_cuda_compiles_at_run_time(name, architecture):
    """As CuPy's RawModule does it: one source, our two include folders, no host header, and the options that it adds."""
    library, program = nvrtc(), ctypes.c_void_p()
    source = (CSRC / "cuda" / f"{name}.cu").read_bytes()
    flags = ["-std=c++17", f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}", f"-arch=sm_{architecture}"]
    flags += ["-ftz=true", "--device-as-default-execution-space"]
    options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None) == 0
    code = library.nvrtcCompileProgram(program, len(flags), options)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert code == 0, log.value.decode()
    library.nvrtcDestroyProgram(ctypes.byref(program))


@pytest.fixture
def stand_in(monkeypatch, emulated_kernel):
    """`cupy` with emulated kernels; what it was asked to compile."""
    asked = []

    def raw_module(code: str, options: tuple[str, ...]):
        asked.append((code, options))
        return SimpleNamespace(get_function=emulated_kernel)

    streams = SimpleNamespace(ExternalStream=nullcontext)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=raw_module, cuda=streams))
    cuda._kernel.cache_clear()
    yield asked
    cuda._kernel.cache_clear()


def test_cupy_launches_what_the_library_does(stand_in, on_host, monkeypatch, make_case):
    """Grid, shared memory and arguments by value, bit for bit, for every instance of the kernels."""

    def answers():
        for dtype in (torch.float32, torch.float64):
            for rows in range(1, 9):
                case = make_case((3, 3, 31, 33), (dtype,), rows, 3, rows, torch.device("cpu"), ("sliced",))
                yield from kernels.combine(case.sources, case.coeffs)
            yield kernels.combine_coeff_grad(case.sources[:2], case.sources)
            for side, noise in ((5, 8), (32, 64), (48, 8)):
                shapes = [(noise, noise), (noise,), (16, side**2), (16,), (4, 16), (4,), (1, 4 + 2 * noise), (1,)]
                weights = [torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape) for shape in shapes]
                levels = torch.tensor([5.0, 1.0], dtype=dtype)
                yield kernels.midpoint(
                    torch.ones(2, 3, side, side), levels, levels / 3, kernels.MidpointWeights(*weights)
                ).sigma

    with kernels.use(on_host):
        expected = list(answers())
        monkeypatch.setattr(cuda, "_launch", lambda name, args, device: cuda._launch_cupy(name, args, 0))
        assert all(torch.equal(a, b) for a, b in zip(answers(), expected, strict=True))
    assert {code for code, _ in stand_in} == {path.read_text() for path in CSRC.glob("cuda/*.cu")}
    assert {options for _, options in stand_in} == {("-std=c++17", f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}")}


@pytest.mark.gpu
def test_cupy_runs_what_it_compiled(monkeypatch, tmp_path):
    """The path of users without nvcc: no library, CuPy compiles the sources."""
    pytest.importorskip("cupy")
    monkeypatch.setattr(cuda, "_LIBRARY", tmp_path / "absent.so")
    x, y = (torch.randn(3, 3, 9, 8, device="cuda") for _ in range(2))
    coeffs = torch.randn(2, 2, 3, device="cuda")
    out = [torch.full_like(x, float("nan")) for _ in range(2)]
    cuda.combine_into([x, y], coeffs, out)
    truth = torch.einsum("mjb,jbchw->mbchw", coeffs.double(), torch.stack([x, y]).double())
    torch.testing.assert_close(torch.stack(out).double(), truth, rtol=1.3e-6, atol=1e-5)
