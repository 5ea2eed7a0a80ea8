"""Arrays of other libraries in and out, without a copy: whatever speaks DLPack (NumPy, CuPy, JAX, PyTorch)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import ConfigError

OUTPUT_TYPES = ("torch", "numpy", "dlpack")


def imported(name: str, value: Any) -> Any:
    """A DLPack array as a tensor of the same memory; anything else as it is.

    An array on a GPU is ordered behind the work of its own stream, on torch's current one. Raises ConfigError.
    """
    if isinstance(value, Tensor) or not hasattr(value, "__dlpack__"):
        return value
    try:
        return torch.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{name}: this {type(value).__name__} cannot be read through DLPack: {error}; pass a dense array of numbers "
            "on the CPU or on a CUDA device"
        ) from error


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")


def delivered(images: Tensor, output_type: str, like: Any) -> Any:
    """The images as the caller wants them.

    "torch" is the tensor. "numpy" copies only what is on a GPU. "dlpack" is an array of the kind of `like` in the tensor's
    memory (NumPy for NumPy, CuPy for CuPy); where `like` is no array, the tensor, which every library's from_dlpack reads.
    """
    if output_type == "numpy":
        return images.cpu().numpy()
    library = None if output_type == "torch" or isinstance(like, Tensor) else _library(like)
    return images if library is None else library.from_dlpack(images)


def _library(array: Any) -> Any:
    """The module with the from_dlpack that makes such arrays; None for what is no array."""
    if not hasattr(array, "__dlpack__"):
        return None
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    root = sys.modules.get(type(array).__module__.partition(".")[0])
    return root if hasattr(root, "from_dlpack") else None
