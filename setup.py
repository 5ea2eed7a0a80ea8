"""Packages and the optional compiled parts; the metadata is in pyproject.toml.

CPU: the pybind11 extension amed_engine._native, wherever a C++ compiler is found. CUDA: the library
kernels/amed_cuda.so, wherever nvcc and a GPU are found; AMED_CUDA=1 or 0 decides it instead. Without either the
package works on plain torch and Triton.
"""

import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11 import get_include
except ImportError:  # an installation without build isolation, on a machine without it
    get_include = None
    print("warning: pybind11 is missing, plain torch runs instead of the extension", file=sys.stderr)

WINDOWS = sys.platform == "win32"
OPENMP = [] if sys.platform == "darwin" else ["/openmp" if WINDOWS else "-fopenmp"]
OPTIMIZE = ["/std:c++17", "/O2"] if WINDOWS else ["-std=c++17", "-O3", "-fvisibility=hidden"]

native = get_include and Extension(
    "amed_engine._native",
    sources=["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
    depends=glob("csrc/include/amed/*.h") + glob("csrc/cpu/*.h"),
    include_dirs=["csrc/include", get_include()],
    extra_compile_args=OPTIMIZE + OPENMP,
    extra_link_args=[] if WINDOWS else OPENMP,
    language="c++",
    optional=True,
)


class BuildOptional(build_ext):
    """A part that does not compile is left out with a warning: every operation also exists in plain torch."""

    def run(self):
        super().run()
        nvcc = shutil.which("nvcc")
        wanted = os.environ.get("AMED_CUDA", "1" if shutil.which("nvidia-smi") else "0") == "1"
        if nvcc and wanted:
            self.build_cuda(nvcc)

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"warning: {ext.name} was not built, plain torch runs instead: {error}", file=sys.stderr)

    def build_cuda(self, nvcc):
        root = Path("kernels") if self.inplace else Path(self.build_lib, "amed_engine", "kernels")
        root.mkdir(parents=True, exist_ok=True)
        architectures = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (80, 90)]
        options = [
            "-std=c++17",
            "-O3",
            "-shared",
            "-Xcompiler=-fPIC",
            "-cudart=static",
            "-Icsrc/include",
            *architectures,
        ]
        command = [nvcc, *options, "-o", str(root / "amed_cuda.so"), *sorted(glob("csrc/cuda/*.cu"))]
        if subprocess.run(command).returncode:
            print("warning: amed_cuda.so was not built, Triton runs instead", file=sys.stderr)


setup(
    # csrc/ goes along: headers for programs that link against the kernels, CUDA for CuPy to compile at run time.
    packages=[*find_packages(include=["amed_engine", "amed_engine.*"]), "amed_engine.kernels", "amed_engine.csrc"],
    package_dir={"amed_engine.kernels": "kernels", "amed_engine.csrc": "csrc"},
    include_package_data=False,  # what is installed stands in pyproject.toml; MANIFEST.in is the source distribution
    ext_modules=[native] if native else [],
    cmdclass={"build_ext": BuildOptional},
)
