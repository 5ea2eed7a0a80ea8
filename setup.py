"""Packages and the optional compiled parts; the metadata is in pyproject.toml.

CPU: the pybind11 extension amed_engine._native and on Linux the C library csrc/lib/libamed.so, wherever a C++ compiler is
found. CUDA: kernels/amed_cuda.so and a part of libamed.so, wherever nvcc and a GPU are found; AMED_CUDA=1 insists,
AMED_CUDA=0 forbids. Without any the package works on plain torch and Triton.
"""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
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
# Clones for newer processors ignore -fvisibility, so the linker is told as well what to show.
LINKER = ["-s", "-soname=libamed.so", "--version-script=csrc/library/amed.map"]
NVCC = ["nvcc", "-std=c++17", "-O3", "-Xcompiler=-fPIC", "-cudart=static", "-Icsrc/include"]
# Machine code for two families, and PTX that the driver compiles for whatever comes after them.
FAMILIES = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]", "--threads=0"]

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


@contextmanager
def optional(part: str, insist: bool = False):
    """A part that does not compile is left out with a warning: every operation also exists in plain torch."""
    try:
        yield
    except Exception as error:
        if insist:
            raise RuntimeError(f"AMED_CUDA=1 insists on {part}, which was not built: {error}") from error
        print(f"warning: {part} was not built: {error}", file=sys.stderr)


class BuildOptional(build_ext):
    def run(self):
        super().run()
        if sys.platform != "linux":
            return
        kernels, library = self.place("kernels", "amed_cuda.so"), self.place("csrc", "lib", "libamed.so")
        wanted, device = os.environ.get("AMED_CUDA", "" if shutil.which("nvidia-smi") else "0"), []
        if wanted != "0":
            with optional("the CUDA part", insist=wanted == "1"):
                device = self.build_cuda(kernels)
        with optional("libamed.so"):
            self.build_library(library, device)

    def build_extension(self, ext):
        with optional(ext.name):
            super().build_extension(ext)

    def place(self, *parts):
        """Where a library goes. One of older sources would be called with other arguments: it goes first."""
        path = Path(*parts) if self.inplace else Path(self.build_lib, "amed_engine", *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        return str(path)

    def build_cuda(self, library):
        """amed_cuda.so; returns the objects of all CUDA sources."""
        objects = {source: Path(self.build_temp, source + ".o") for source in sorted(glob("csrc/*/*.cu"))}
        for source, target in objects.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*NVCC, *FAMILIES, "-c", "-o", str(target), source], check=True)
        kernels = [str(path) for source, path in objects.items() if source.startswith("csrc/cuda/")]
        subprocess.run([*NVCC, "-shared", "-o", library, *kernels], check=True)
        return [str(path) for path in objects.values()]

    def build_library(self, library, device):
        """libamed.so, the C API for programs without Python; with the objects of the CUDA part it also runs on streams."""
        sources = sorted(glob("csrc/library/*.cpp") + glob("csrc/cpu/*.cpp"))
        if device:
            link = [f"-Xlinker={option}" for option in LINKER]
            command = [*NVCC, "-DAMED_WITH_CUDA", "-Xcompiler=-fopenmp,-fvisibility=hidden", *link, *device]
        else:
            compiler = os.environ.get("CXX") or shutil.which("g++") or "clang++"
            command = [*compiler.split(), *OPTIMIZE, *OPENMP, "-fPIC", "-Icsrc/include"]
            command += [f"-Wl,{option}" for option in LINKER]
        subprocess.run([*command, "-shared", "-o", library, *sources], check=True)


setup(
    # csrc/ goes along: headers and library for other programs, CUDA for CuPy to compile at run time.
    packages=[*find_packages(include=["amed_engine", "amed_engine.*"]), "amed_engine.kernels", "amed_engine.csrc"],
    package_dir={"amed_engine.kernels": "kernels", "amed_engine.csrc": "csrc"},
    include_package_data=False,  # what is installed stands in pyproject.toml; MANIFEST.in is the source distribution
    ext_modules=[native] if native else [],
    cmdclass={"build_ext": BuildOptional},
)
