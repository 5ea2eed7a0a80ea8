"""Arrays of other libraries in and out, without a copy: whatever speaks DLPack (NumPy, CuPy, JAX, PyTorch)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import ConfigError

OUTPUT_TYPES = ("torch", "numpy", "dlpack")
IMMUTABLE = ("jax", "jaxlib")  # libraries whose arrays never change


def imported(name: str, value: Any) -> Any:
    """A DLPack array as a tensor of the same memory; anything else as it is.

    An array on a GPU is ordered behind the work of its own stream, on torch's current one. Raises ConfigError.
    """
    if isinstance(value, Tensor) or not hasattr(value, "__dlpack__"):
        return value
    strides = getattr(value, "strides", None)
    if isinstance(strides, tuple) and any(step < 0 for step in strides):  # torch would end the process
        raise ConfigError(f"{name}: torch has no tensors of negative strides, got {strides}; pass a copy of the array")
    try:
        return torch.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{name}: this {type(value).__name__} cannot be read through DLPack: {error}; pass a dense array of numbers "
            "on the CPU or on a CUDA device"
        ) from error


def writable(name: str, value: Any) -> Any:
    """`imported` for an array that is written to. Raises ConfigError for a read-only one too, which DLPack does not tell."""
    if getattr(getattr(value, "flags", None), "writeable", True) is False or _root(value) in IMMUTABLE:
        raise ConfigError(
            f"{name} is written to, and this {type(value).__name__} is read-only; pass another, or output_type='dlpack' instead"
        )
    return imported(name, value)


def check_out(out: Any, latents: Tensor) -> None:
    """Raise ConfigError for what images like these latents cannot be written to; None passes."""
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise ConfigError(f"out must be a tensor to write the images to, got {type(out).__name__}")
    got, expected = (tuple(out.shape), out.dtype, out.device), (tuple(latents.shape), latents.dtype, latents.device)
    if got != expected:
        raise ConfigError(f"out must be {expected} (shape, dtype, device), got {got}")
    if out.requires_grad or any(step == 0 and n > 1 for step, n in zip(out.stride(), out.shape, strict=False)):
        raise ConfigError(
            "out is written to: it must not require gradients, nor be an expanded view; pass a plain tensor"
        )


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
    root = sys.modules.get(_root(array))
    return root if hasattr(root, "from_dlpack") else None


def _root(array: Any) -> str:
    """The name of the library that an array is of."""
    return type(array).__module__.partition(".")[0]
