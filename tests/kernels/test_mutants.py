"""The comparison with float64 has teeth: a kernel whose source takes one coefficient 1e-3 too large fails it.

Each implementation is made from its own source, as it stands and with one expression changed.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from amed_engine.kernels import cuda

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# implementation: file, expression, the same with the coefficient of source 1 off by a thousandth
MUTATIONS = {
    "reference": ("kernels/reference.py", "torch.addcmul(total, coeff,", "torch.addcmul(total, coeff + 1e-3,"),
    "native": ("csrc/cpu/combine.cpp", "c[j] = coeff[j * stride[1]]", "c[j] = coeff[j * stride[1]] + T(j == 1) / 1000"),
    "emulated": ("csrc/cuda/combine.cu", "fused(coeff, row", "fused(coeff + T(j == 1) / 1000, row"),
    "triton": ("kernels/triton_combine.py", "tl.fma(values, coeff,", "tl.fma(values, coeff + (j == 1) * 1e-3,"),
}
Combine = Callable[[list[torch.Tensor], torch.Tensor, list[torch.Tensor]], None]


def python(source: Path) -> Combine:
    """combine_into of a module that takes the place of the one of that name."""
    spec = importlib.util.spec_from_file_location(f"amed_engine.kernels.{source.stem}_changed", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.combine_into


def compiled(source: Path) -> Combine:
    """The same of C++, for the CPU or as csrc/tests/emulated/ compiles CUDA for it."""
    csrc, library, on_gpu = source.parents[1], source.with_suffix(".so"), source.suffix == ".cu"
    compiler = (
        [sys.executable, csrc / "tests/emulated/nvcc.py"] if on_gpu else ["g++", "-std=c++17", "-DAMED_NO_CLONES"]
    )
    files = [source] if on_gpu else [source, csrc / "cpu/vector.cpp"]
    command = [*compiler, "-O0", "-shared", "-fPIC", f"-I{csrc / 'include'}", "-o", library, *files]
    subprocess.run([str(word) for word in command], check=True)
    loaded = ctypes.CDLL(str(library))

    def combine_into(sources, coeffs, out):
        args = cuda._operands(sources, out, coeffs.dtype == torch.float64)
        args.coeffs = coeffs.data_ptr()
        args.coeff_stride[:] = coeffs.stride()
        if on_gpu:
            assert loaded.amed_cuda_combine(ctypes.byref(args), None) == 0
        else:
            loaded._ZN4amed3cpu7combineERKNS_11CombineArgsEi(ctypes.byref(args), 1)

    return combine_into


@pytest.mark.parametrize("name", ["triton"] if INTERPRETED else ["reference", "native", "emulated"])
def test_a_kernel_with_one_coefficient_off_fails(name, tmp_path, make_case, assert_matches):
    if name in ("native", "emulated") and (sys.platform != "linux" or shutil.which("g++") is None):
        pytest.skip("needs Linux and g++")
    file, expression, changed = MUTATIONS[name]

    def compare(combine_into: Combine, dtype: torch.dtype) -> None:
        case = make_case((3, 3, 9, 8), (dtype,), 2, 3, 11, torch.device("cpu"), ("sliced",))
        out = [torch.full_like(source, float("nan")) for source in case.sources[:2]]
        combine_into(case.sources, case.coeffs, out)
        assert_matches(out, case)

    for folder, replacement in (("as it stands", expression), ("changed", changed)):
        shutil.copytree(ROOT / "csrc", tmp_path / folder / "csrc", ignore=shutil.ignore_patterns("lib", "library"))
        shutil.copytree(ROOT / "kernels", tmp_path / folder / "kernels", ignore=shutil.ignore_patterns("*.so"))
        source = tmp_path / folder / file
        text = source.read_text()
        assert text.count(expression) == 1
        source.write_text(text.replace(expression, replacement))
        combine_into = (python if source.suffix == ".py" else compiled)(source)
        for dtype in (torch.float32,) if INTERPRETED else (torch.float32, torch.float64, torch.float16):
            if folder == "changed":
                with pytest.raises(AssertionError, match="not close"):
                    compare(combine_into, dtype)
            else:
                compare(combine_into, dtype)
