"""C++ on the CPU. The one place that knows whether the compiled extension `amed_engine._native` is there."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .layout import batch_strides
from .reference import MidpointWeights, frequency_values

try:
    # After torch, so that OpenMP calls bind to torch's threads instead of a second pool.
    _extension: Any = import_module("amed_engine._native")
    _reason = ""
except ImportError as error:
    _extension, _reason = None, str(error)

_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def available() -> bool:
    """Whether the compiled extension can be used."""
    return _extension is not None


def why_not() -> str:
    """Why the extension is not used; empty where it is."""
    return _reason


def combine_into(sources: Sequence[Tensor], coeffs: Tensor, out: Sequence[Tensor]) -> None:
    """`reference.combine` on the CPU, of checked arguments whose samples are dense in one order, none empty."""
    batch = sources[0].shape[0]
    _extension.combine(
        *_views(sources),
        *_views(out),
        coeffs.data_ptr(),
        batch_strides(coeffs),
        batch,
        sources[0].numel() // batch,
        coeffs.dtype == torch.float64,
        torch.get_num_threads(),
    )


def coeff_grad_into(grads: Sequence[Tensor], sources: Sequence[Tensor], result: Tensor) -> None:
    """`reference.combine_coeff_grad` on the CPU, of such arguments."""
    batch = grads[0].shape[0]
    _extension.combine_coeff_grad(
        *_views(grads),
        *_views(sources),
        result.data_ptr(),
        batch,
        grads[0].numel() // batch,
        result.dtype == torch.float64,
        torch.get_num_threads(),
    )


def midpoint_into(
    features: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weights: MidpointWeights,
    scale_dir: float,
    scale_time: float,
    table: Tensor,
) -> None:
    """`reference.midpoint_table` on the CPU; features (B, C, h, w), each sample contiguous like every weight."""
    hidden, pixels = weights.enc_layer0_weight.shape
    view = (0,) * 5  # address, batch stride, channel stride, dtype code, channels
    if features is not None:
        view = (features.data_ptr(), features.stride(0), pixels, _CODES[features.dtype], features.shape[1])
    _extension.midpoint(
        table.shape[1],
        view,
        (sigma.data_ptr(), sigma_next.data_ptr()),
        batch_strides(sigma) + batch_strides(sigma_next),
        (weights.map_layer0_weight.shape[0], hidden, weights.enc_layer1_weight.shape[0], pixels),
        frequency_values(weights.map_layer0_weight.shape[0]),
        [0 if tensor is None else tensor.data_ptr() for tensor in weights],
        (scale_dir, scale_time),
        table.data_ptr(),
        sigma.dtype == torch.float64,
        torch.get_num_threads(),
    )


def _views(tensors: Sequence[Tensor]) -> tuple[list[int], list[int], list[int]]:
    return (
        [tensor.data_ptr() for tensor in tensors],
        [tensor.stride(0) for tensor in tensors],
        [_CODES[tensor.dtype] for tensor in tensors],
    )
