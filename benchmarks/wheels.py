"""Wheels of packages on PyPI, by their bytes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path


def download(folder: Path, package: str, name: str, sha256: str) -> Path:
    """The wheel in this folder, downloaded by pip where it is not there yet. Raises ValueError where its bytes differ."""
    wheel = folder / name
    if not wheel.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        subprocess.run(pip, check=True)
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{wheel} has SHA-256 {found}, expected {sha256}: another file; delete it and run again")
    return wheel
