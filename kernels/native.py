"""C++ on the CPU. The one place that knows whether the compiled extension `amed_engine._native` is there."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .layout import hand_over, in_format, sample_format, targets_in
from .reference import MidpointWeights, accumulation_dtype, frequency_values

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
    """`reference.combine` into given outputs, on the CPU; arguments are checked by the caller."""
    first = sources[0]
    order = sample_format(first)
    sources = [in_format(source, order) for source in sources]
    targets = targets_in(order, out)
    batch = first.shape[0]
    _extension.combine(
        *_views(sources),
        *_views(targets),
        coeffs.data_ptr(),
        _coeff_strides(coeffs),
        batch,
        first.numel() // max(batch, 1),
        coeffs.dtype == torch.float64,
        torch.get_num_threads(),
    )
    hand_over(targets, out)


def combine_coeff_grad(grads: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """`reference.combine_coeff_grad` on the CPU."""
    first = grads[0]
    order = sample_format(first)
    dtype = accumulation_dtype(first.dtype)
    result = torch.empty(len(grads), len(sources), first.shape[0], dtype=dtype)
    # Named, since only addresses are handed on: a copy made here must outlive the call.
    grads = [in_format(grad, order) for grad in grads]
    sources = [in_format(source, order) for source in sources]
    _extension.combine_coeff_grad(
        *_views(grads),
        *_views(sources),
        result.data_ptr(),
        first.shape[0],
        first.numel() // max(first.shape[0], 1),
        dtype == torch.float64,
        torch.get_num_threads(),
    )
    return result


def midpoint_table(
    features: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weights: MidpointWeights,
    scale_dir: float,
    scale_time: float,
) -> Tensor:
    """`reference.midpoint_table` on the CPU, without gradients."""
    batch = sigma.shape[0] if features is None else features.shape[0]
    kept = [None if tensor is None else tensor.contiguous() for tensor in weights]
    hidden, pixels = weights.enc_layer0_weight.shape
    result = torch.empty(10, batch, dtype=sigma.dtype)
    maps, view = _feature_view(features)
    _extension.midpoint(
        batch,
        view,
        (sigma.data_ptr(), sigma_next.data_ptr()),
        tuple(level.stride(0) if level.shape[0] > 1 else 0 for level in (sigma, sigma_next)),
        (weights.map_layer0_weight.shape[0], hidden, weights.enc_layer1_weight.shape[0], pixels),
        frequency_values(weights.map_layer0_weight.shape[0]),
        [0 if tensor is None else tensor.data_ptr() for tensor in kept],
        (scale_dir, scale_time),
        result.data_ptr(),
        sigma.dtype == torch.float64,
        torch.get_num_threads(),
    )
    del maps  # the copy behind `view`, alive until here
    return result


def _views(tensors: Sequence[Tensor]) -> tuple[list[int], list[int], list[int]]:
    return (
        [tensor.data_ptr() for tensor in tensors],
        [tensor.stride(0) for tensor in tensors],
        [_CODES[tensor.dtype] for tensor in tensors],
    )


def _coeff_strides(coeffs: Tensor) -> tuple[int, int, int]:
    m, j, b = coeffs.stride()
    return m, j, b if coeffs.shape[2] > 1 else 0


def _feature_view(features: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int, int, int]]:
    """(tensor that owns the memory, (address, batch stride, channel stride, dtype code, channels))."""
    if features is None:
        return None, (0, 0, 0, 0, 0)
    maps = in_format(features if features.dim() == 4 else features.unsqueeze(1), torch.contiguous_format)
    view = (maps.data_ptr(), maps.stride(0), maps.shape[2] * maps.shape[3], _CODES[maps.dtype], maps.shape[1])
    return maps, view
