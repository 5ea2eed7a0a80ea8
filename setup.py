"""Packages and the optional compiled parts; the metadata is in pyproject.toml.

CPU: the pybind11 extension amed_engine._native, wherever a C++ compiler is found. CUDA: the library
kernels/amed_cuda.so, wherever nvcc and a GPU are found; AMED_CUDA=1 or 0 decides it instead. On Linux either compiler
also makes the C library csrc/lib/libamed.so. Without any the package works on plain torch and Triton.
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
# Clones for newer processors ignore -fvisibility, so the linker is told as well what to show.
LIBRARY = ["-s", "-soname=libamed.so", "--version-script=csrc/library/amed.map"]
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
        wanted = os.environ.get("AMED_CUDA", "1" if shutil.which("nvidia-smi") else "0") == "1"
        nvcc = shutil.which("nvcc") if wanted else None
        if nvcc:
            self.run_nvcc(nvcc, self.folder("kernels") / "amed_cuda.so", sorted(glob("csrc/cuda/*.cu")))
        if sys.platform == "linux":
            self.build_library(nvcc)

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"warning: {ext.name} was not built, plain torch runs instead: {error}", file=sys.stderr)

    def folder(self, *parts):
        root = Path(*parts) if self.inplace else Path(self.build_lib, "amed_engine", *parts)
        root.mkdir(parents=True, exist_ok=True)
        return root

    def build_library(self, nvcc):
        """The C API for programs without Python; with nvcc it also runs on CUDA streams."""
        target = self.folder("csrc", "lib") / "libamed.so"
        sources = sorted(glob("csrc/library/*.cpp") + glob("csrc/cpu/*.cpp"))
        if nvcc:
            host = [
                "-DAMED_WITH_CUDA",
                "-Xcompiler=-fopenmp,-fvisibility=hidden",
                *(f"-Xlinker={option}" for option in LIBRARY),
            ]
            return self.run_nvcc(nvcc, target, sorted(glob("csrc/*/*.cu")) + sources, host)
        try:
            options = {"output_dir": self.build_temp, "include_dirs": ["csrc/include"]}
            objects = self.compiler.compile(sources, extra_postargs=OPTIMIZE + OPENMP, **options)
            link = [*OPENMP, *(f"-Wl,{option}" for option in LIBRARY)]
            self.compiler.link_shared_object(objects, str(target), extra_postargs=link, target_lang="c++")
        except Exception as error:
            print(f"warning: {target.name} was not built: {error}", file=sys.stderr)

    def run_nvcc(self, nvcc, target, sources, options=()):
        architectures = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (80, 90)]
        common = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static", "-Icsrc/include"]
        if subprocess.run([nvcc, *common, *architectures, *options, "-o", str(target), *sources]).returncode:
            print(f"warning: {target.name} was not built by nvcc", file=sys.stderr)


setup(
    # csrc/ goes along: headers and library for other programs, CUDA for CuPy to compile at run time.
    packages=[*find_packages(include=["amed_engine", "amed_engine.*"]), "amed_engine.kernels", "amed_engine.csrc"],
    package_dir={"amed_engine.kernels": "kernels", "amed_engine.csrc": "csrc"},
    include_package_data=False,  # what is installed stands in pyproject.toml; MANIFEST.in is the source distribution
    ext_modules=[native] if native else [],
    cmdclass={"build_ext": BuildOptional},
)
