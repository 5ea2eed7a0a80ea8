"""What a report of a problem should say: versions, devices, active kernels, bundled models."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import metadata
from typing import Any

import torch

import amed_engine
from amed_engine import kernels, zoo
from amed_engine.engine.export.locations import get_library
from amed_engine.errors import ConfigError
from amed_engine.kernels import cuda, native


def facts() -> dict[str, dict[str, Any]]:
    """Sections of named facts, JSON-able; `amed info` prints them."""
    gpus = range(torch.cuda.device_count())
    return {
        "versions": {
            "amed_engine": amed_engine.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "triton", "numpy")},
        },
        "devices": {
            "cpu": f"{torch.get_num_threads()} threads of {os.cpu_count()}",
            **{f"cuda:{gpu}": torch.cuda.get_device_name(gpu) for gpu in gpus},
        },
        "kernels": {
            **kernels.backends(),
            "extension": native.why_not() or "active",
            "cuda_c++": f"{cuda.maker() or 'not built'}, {cuda.why_not() or 'active'}",
            "libamed": _library(),
        },
        "predictors": {name: zoo.predictor_nfes(name) for name in zoo.names()},
    }


def mean_facts(name: str, model: Any, sigma_max: float | None = None) -> dict[str, dict[str, Any]]:
    """What a model answers to noise alone, on average: see `measure_mean`. name: of the model, for the heading."""
    mean = amed_engine.measure_mean(model, sigma_max=sigma_max)
    rows = mean.rows().flatten(1).double()
    names = (
        ["all"]
        if not mean.classes
        else ["no class", *(map(str, range(mean.classes)) if len(rows) > 2 else ["any class"])]
    )
    answers = {
        name: f"mean {row.mean():.4g}, standard deviation {row.std(correction=0):.4g}"
        for name, row in zip(names, rows, strict=True)
    }
    return {f"mean answer of {name} at sigma {mean.sigma:g}": {"latents": str(mean.latents), **answers}}


def _library() -> str:
    """The C library and what it can do, or why it cannot be loaded."""
    try:
        library = ctypes.CDLL(get_library())
    except (ConfigError, OSError) as error:
        return str(error)
    return "active, with CUDA" if library.amed_has_cuda() else "active, without CUDA"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
