"""Argument checks and memory layout, shared by every implementation; raises before anything is launched."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import MidpointWeights, accumulation_dtype

MAX_SOURCES = 16
MAX_OUTPUTS = 8
_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_list(name: str, tensors: Sequence[Tensor], limit: int) -> None:
    """The tensors are 1 .. limit, alike in shape and device, floating and no wider than the first's accumulation."""
    if not 1 <= len(tensors) <= limit:
        raise ValueError(f"{name} must be 1 to {limit} tensors, got {len(tensors)}; fold or split the update")
    first = tensors[0]
    shape, device = first.shape, first.device
    if len(shape) < 1:
        raise ValueError(f"{name}[0] must have a batch dimension, got a 0-dimensional tensor; reshape it to (B, ...)")
    widest = accumulation_dtype(first.dtype)
    for k, tensor in enumerate(tensors):
        if tensor.shape != shape:
            raise ValueError(f"{name}[{k}] must have shape {tuple(shape)} like {name}[0], got {tuple(tensor.shape)}")
        dtype = tensor.dtype
        if dtype not in _FLOATING:
            raise ValueError(f"{name}[{k}] must be float16, bfloat16, float32 or float64, got {dtype}; convert it")
        if dtype == torch.float64 and widest != torch.float64:
            raise ValueError(f"{name}[{k}] is float64 but {name}[0] is {first.dtype}; convert one of them")
        if tensor.device != device:
            raise ValueError(f"{name}[{k}] must be on {device} like {name}[0], got {tensor.device}; move it")


def check_combine(sources: Sequence[Tensor], coeffs: Tensor) -> None:
    """Refuse arguments that `combine` does not define."""
    check_list("sources", sources, MAX_SOURCES)
    first = sources[0]
    shape, count, batch = coeffs.shape, len(sources), first.shape[0]
    if len(shape) != 3 or shape[1] != count or (shape[2] != 1 and shape[2] != batch):
        raise ValueError(f"coeffs must have shape (M, {count}, {batch}) or (M, {count}, 1), got {tuple(shape)}")
    if not 1 <= shape[0] <= MAX_OUTPUTS:
        raise ValueError(f"coeffs must give 1 to {MAX_OUTPUTS} outputs, got {shape[0]}; split the call")
    if coeffs.dtype != accumulation_dtype(first.dtype):
        wanted = accumulation_dtype(first.dtype)
        raise ValueError(f"coeffs must be {wanted} for {first.dtype} sources[0], got {coeffs.dtype}; convert it")
    if coeffs.device != first.device:
        raise ValueError(f"coeffs must be on {first.device} like sources, got {coeffs.device}; move it")


def check_dots(grads: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Refuse arguments that `combine_coeff_grad` does not define."""
    check_list("grads", grads, MAX_OUTPUTS)
    check_list("sources", sources, MAX_SOURCES)
    check_list("[grads[0], sources[0]]", [grads[0], sources[0]], 2)


def check_out(sources: Sequence[Tensor], coeffs: Tensor, out: Sequence[Tensor]) -> None:
    """Refuse outputs that do not fit."""
    first = sources[0]
    if len(out) != coeffs.shape[0]:
        raise ValueError(f"out must be {coeffs.shape[0]} tensors, one per row of coeffs, got {len(out)}")
    for m, target in enumerate(out):
        if target.shape != first.shape or target.dtype != first.dtype or target.device != first.device:
            raise ValueError(
                f"out[{m}] must be {tuple(first.shape)} {first.dtype} on {first.device} like sources[0], "
                f"got {tuple(target.shape)} {target.dtype} on {target.device}"
            )


def check_memory(sources: Sequence[Tensor], coeffs: Tensor, out: Sequence[Tensor]) -> None:
    """Refuse outputs that share memory with an input in any way but element for element."""
    taken = [_span(coeffs)]
    read = [(_span(source), source) for source in sources]
    for m, target in enumerate(out):
        if any(size > 1 and stride == 0 for size, stride in zip(target.shape, target.stride(), strict=True)):
            raise ValueError(f"out[{m}] is expanded: several of its elements share memory; pass a tensor of its own")
        span = _span(target)
        if any(_meet(span, other) and not _same_view(target, source) for other, source in read):
            raise ValueError(f"out[{m}] overlaps a source in part; pass the same view or separate memory")
        if any(_meet(span, other) for other in taken):
            raise ValueError(f"out[{m}] overlaps coeffs or another output; pass separate memory")
        taken.append(span)


def check_midpoint(
    features: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weights: MidpointWeights,
    scale_dir: float,
    scale_time: float,
) -> None:
    """Refuse arguments that `midpoint` does not define."""
    batch, pixels = sigma.numel(), None
    if features is not None:
        if features.dim() not in (3, 4) or features.dtype not in _FLOATING:
            got = f"{features.dtype} {tuple(features.shape)}"
            raise ValueError(f"features must be floating (B, C, h, w) or (B, h, w), got {got}")
        if 0 in features.shape[1:]:
            raise ValueError(
                f"features must have channels and pixels, got {tuple(features.shape)}; pass None for zeros"
            )
        if features.device != sigma.device:
            raise ValueError(f"features must be on {sigma.device} like sigma, got {features.device}; move them")
        batch, pixels = features.shape[0], features.shape[-2] * features.shape[-1]
    for name, level in (("sigma", sigma), ("sigma_next", sigma_next)):
        if level.dim() != 1 or level.shape[0] not in (1, batch):
            raise ValueError(
                f"{name} must have shape ({batch},) or (1,), got {tuple(level.shape)}; expand or reshape it"
            )
        if level.dtype not in (torch.float32, torch.float64) or level.dtype != sigma.dtype:
            raise ValueError(f"{name} must be float32 or float64 and like sigma, got {level.dtype}; convert it")
    _check_weights(weights, sigma, pixels)
    for name, width in (("scale_dir", scale_dir), ("scale_time", scale_time)):
        present = getattr(weights, f"fc_{name}_weight") is not None
        if present != (width != 0):
            raise ValueError(f"{name}={width} but its head is {'there' if present else 'absent'}; 0 means no head")


def _check_weights(weights: MidpointWeights, sigma: Tensor, pixels: int | None) -> None:
    """Shapes agree with each other and with the features; dtype and device are those of sigma."""
    channels, hidden = weights.map_layer0_weight.shape[0], weights.enc_layer0_weight.shape[0]
    encoded = weights.enc_layer1_weight.shape[0]
    pixels = weights.enc_layer0_weight.shape[1] if pixels is None else pixels
    if channels < 4 or channels % 2 or pixels < 1:
        raise ValueError(
            "a predictor must have an even number of noise channels, 4 or more, and a pixel, "
            f"got {channels} in map_layer0_weight and {pixels} in enc_layer0_weight"
        )
    inputs = encoded + 2 * channels
    shapes = [(channels, channels), (channels,), (hidden, pixels), (hidden,), (encoded, hidden), (encoded,)]
    shapes += [(1, inputs), (1,)] * 3
    for name, tensor, shape in zip(weights._fields, weights, shapes, strict=True):
        if tensor is None and name.startswith("fc_scale") and getattr(weights, name.replace("bias", "weight")) is None:
            continue
        if tensor is None or tensor.shape != shape:
            got = None if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{name} must have shape {shape}, got {got}; does the predictor fit this bottleneck?")
        if tensor.dtype != sigma.dtype or tensor.device != sigma.device:
            raise ValueError(
                f"{name} must be {sigma.dtype} on {sigma.device} like sigma, got {tensor.dtype} on {tensor.device}"
            )


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses from the first element to behind the last."""
    start, count = tensor.data_ptr(), tensor.numel()
    if not tensor.is_contiguous():
        count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + count * tensor.element_size()


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether the address ranges meet (those of interleaved views do, though they share no element)."""
    return a[0] < b[1] and b[0] < a[1]


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype


# ---- memory order inside a sample ----


def sample_format(tensor: Tensor) -> torch.memory_format:
    """The order of elements inside a sample that kernels use for a call whose first source is `tensor`."""
    if tensor.dim() == 4 and not _dense(tensor, torch.contiguous_format) and _dense(tensor, torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def sources_in(order: torch.memory_format, sources: Sequence[Tensor]) -> list[Tensor]:
    """What a kernel may read in that order: sources whose samples are dense in it (batch stride free), copies of others."""
    return [t if _dense(t, order) else t.contiguous(memory_format=order) for t in sources]


def targets_in(order: torch.memory_format, out: Sequence[Tensor]) -> list[Tensor]:
    """What a kernel may write to in that order: the given outputs, new memory for those of another order."""
    return [t if _dense(t, order) else torch.empty_like(t, memory_format=order) for t in out]


def as_maps(features: Tensor) -> Tensor:
    """(B, C, h, w), each sample contiguous, of features that may be averaged, (B, h, w)."""
    return sources_in(torch.contiguous_format, [features if features.dim() == 4 else features.unsqueeze(1)])[0]


def batch_strides(values: Tensor) -> tuple[int, ...]:
    """Strides of (..., B) or (..., 1), the last of them 0 where one value is for the whole batch."""
    strides = values.stride()
    return strides if values.shape[-1] > 1 else (*strides[:-1], 0)


def hand_over(targets: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Copy what was written to new memory into the outputs it stands for."""
    for target, given in zip(targets, out, strict=True):
        if target is not given:
            given.copy_(target)


def _dense(tensor: Tensor, order: torch.memory_format) -> bool:
    if tensor.is_contiguous() if order is torch.contiguous_format else tensor.is_contiguous(memory_format=order):
        return True
    shape, strides = tensor.shape, tensor.stride()
    positions = (1, 3, 2) if order == torch.channels_last else range(len(shape) - 1, 0, -1)
    expected = 1
    for k in positions:
        if shape[k] != 1 and strides[k] != expected:
            return False
        expected *= shape[k]
    return True
