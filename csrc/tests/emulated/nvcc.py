"""Compiles CUDA C++ for the CPU, so that kernels run in tests where there is no GPU: nvcc.py [g++ options] FILES.

g++ reads the sources as they are, but for three spellings that C++ lacks: launches, dynamic shared memory, PTX.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPELLINGS = [
    (r"(\w+)<<<(.*?)>>>\((.*?)\);", r"emulated::Launch{\2}(\1, \3);"),
    (r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = static_cast<\1*>(emulated::shared());"),
    (
        r'asm\("([\w.]+) %0, %1;" : "=\w"\((\w+)\) : "\w"\((\w+)\)\);',
        lambda found: f"emulated::{found[1].replace('.', '_')}({found[2]}, {found[3]});",
    ),
]


def translate(source: Path, folder: Path) -> Path:
    """A copy that g++ understands; what it includes is found where it was."""
    text = source.read_text()
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    target = folder / source.name
    target.write_text(text)
    return target


def main(words: list[str]) -> int:
    folders = list(dict.fromkeys(Path(word).resolve().parent for word in words if word.endswith(".cu")))
    with tempfile.TemporaryDirectory() as name:
        for header in [header for folder in folders for header in folder.glob("*.cuh")]:
            translate(header, Path(name))
        sources = [str(translate(Path(word), Path(name))) if word.endswith(".cu") else word for word in words]
        includes = [f"-I{folder}" for folder in (name, HERE, *folders)]
        options = [
            "-std=c++17",
            "-fno-strict-aliasing",
            "-Wno-unknown-pragmas",
            "-include",
            "cuda_runtime.h",
            *includes,
        ]
        return subprocess.run([os.environ.get("CXX", "g++"), *options, "-x", "c++", *sources]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
