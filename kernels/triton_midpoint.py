"""Triton kernel of `midpoint`: the whole AMED predictor of one sample in one program, and its launcher."""

# Triton compiles the kernels from their source; for a type checker they are not Python.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import batch_strides
from .reference import MidpointWeights, frequency_values
from .triton_combine import TL_DTYPES

NUM_WARPS = 4
# Elements that one program keeps in registers at a time.
TILE = 4096


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _sine(angle, quadrant, ACC: tl.constexpr):
    """sin(angle + quadrant·pi/2).

    In float32 by Taylor series on [-pi/4, pi/4] (error below 1e-7 up to |angle| of 1e4): the library's sine carries a
    path for huge angles, in float64 and on the stack.
    """
    if ACC == tl.float64:  # noqa: SIM300
        return tl.where(quadrant == 1, tl.cos(angle), tl.sin(angle))
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi/2 = 1.5707963705... - 4.3711390e-8: the first part is a float32, so the first step is exact.
    x = tl.fma(turns, tl.full(turns.shape, 4.371139000186243e-8, ACC),
               tl.fma(turns, tl.full(turns.shape, -1.5707963705062866, ACC), angle))  # fmt: skip
    square = x * x
    sine = x + x * square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880))))
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320 - square / 3628800))))
    quadrant += turns.to(tl.int32)
    value = tl.where(quadrant % 2 == 0, sine, cosine)
    return tl.where((quadrant & 2) == 0, value, -value)


@triton.jit
def _average(features, channel_stride, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, P: tl.constexpr,
             ROWS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Mean over channels: (P,), zero beyond PIXELS."""
    pixel = tl.arange(0, P)
    total = tl.zeros((P,), ACC)
    for first in range(0, CHANNELS, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < CHANNELS)[:, None] & (pixel < PIXELS)[None, :]
        tile = tl.load(features + row[:, None] * channel_stride + pixel[None, :], mask=inside, other=0.0)
        total += tl.sum(tile.to(ACC), axis=0)
    return total / CHANNELS


@triton.jit
def _encode(mean, enc0_weight, enc0_bias, enc1_weight, enc1_bias, PIXELS: tl.constexpr, P: tl.constexpr,
            HIDDEN: tl.constexpr, ROWS: tl.constexpr, ENCODED: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
            FEATURES: tl.constexpr):  # fmt: skip
    """enc_layer1(silu(enc_layer0(mean))): (K,), the hidden layer taken ROWS units at a time."""
    pixel, unit = tl.arange(0, P), tl.arange(0, K)
    encoded = tl.load(enc1_bias + unit, mask=unit < ENCODED, other=0.0).to(ACC)
    for first in range(0, HIDDEN, ROWS):
        row = first + tl.arange(0, ROWS)
        hidden = tl.load(enc0_bias + row, mask=row < HIDDEN, other=0.0).to(ACC)
        if FEATURES:
            inside = (row < HIDDEN)[:, None] & (pixel < PIXELS)[None, :]
            weight = tl.load(enc0_weight + row[:, None] * PIXELS + pixel[None, :], mask=inside, other=0.0)
            hidden += tl.sum(weight * mean[None, :], axis=1)
        hidden = hidden * _sigmoid(hidden)
        inside = (unit < ENCODED)[:, None] & (row < HIDDEN)[None, :]
        weight = tl.load(enc1_weight + unit[:, None] * HIDDEN + row[None, :], mask=inside, other=0.0)
        encoded += tl.sum(weight * hidden[None, :], axis=1)
    return encoded


@triton.jit
def _embed(sigma, weight, bias, FREQUENCIES: tl.constexpr, NOISE: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr):
    """silu(map_layer0([sin(sigma f), cos(sigma f)])): (E,)."""
    k = tl.arange(0, E)
    frequency = tl.zeros((E,), ACC)
    for i in tl.static_range(NOISE // 2):
        frequency = tl.where(k % (NOISE // 2) == i, tl.full((E,), FREQUENCIES[i], ACC), frequency)
    wave = _sine(sigma * frequency, (k >= NOISE // 2).to(tl.int32), ACC)
    inside = (k < NOISE)[:, None] & (k < NOISE)[None, :]
    matrix = tl.load(weight + k[:, None] * NOISE + k[None, :], mask=inside, other=0.0)
    out = tl.sum(matrix * wave[None, :], axis=1) + tl.load(bias + k, mask=k < NOISE, other=0.0)
    return out * _sigmoid(out)


@triton.jit
def _head(weight, bias, encoded, now, later, ENCODED: tl.constexpr, K: tl.constexpr, NOISE: tl.constexpr,
          E: tl.constexpr):  # fmt: skip
    """sigmoid(weight . [encoded, now, later] + bias), without building the concatenation."""
    unit, k = tl.arange(0, K), tl.arange(0, E)
    total = tl.sum(tl.load(weight + unit, mask=unit < ENCODED, other=0.0) * encoded, axis=0)
    total += tl.sum(tl.load(weight + ENCODED + k, mask=k < NOISE, other=0.0) * now, axis=0)
    total += tl.sum(tl.load(weight + ENCODED + NOISE + k, mask=k < NOISE, other=0.0) * later, axis=0)
    return _sigmoid(total + tl.load(bias))


@triton.jit
def midpoint_kernel(features, batch_stride, channel_stride, sigmas, sigma_stride, sigmas_next,
                    sigma_next_stride, map_weight, map_bias, enc0_weight, enc0_bias, enc1_weight, enc1_bias,
                    r_weight, r_bias, dir_weight, dir_bias, time_weight, time_bias, result, batch,
                    PIXELS: tl.constexpr, P: tl.constexpr, HIDDEN: tl.constexpr, ENCODED: tl.constexpr,
                    K: tl.constexpr, NOISE: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
                    CHANNELS: tl.constexpr, FREQUENCIES: tl.constexpr, SCALE_DIR: tl.constexpr,
                    SCALE_TIME: tl.constexpr):  # fmt: skip
    """One program: one sample, from its bottleneck to the ten rows of `reference.midpoint_table`."""
    sample = tl.program_id(0).to(tl.int64)
    mean = tl.zeros((P,), ACC)
    if CHANNELS > 0:
        mean = _average(features + sample * batch_stride, channel_stride, CHANNELS, PIXELS, P, ROWS, ACC)
    encoded = _encode(mean, enc0_weight, enc0_bias, enc1_weight, enc1_bias, PIXELS, P, HIDDEN, ROWS, ENCODED, K, ACC,
                      CHANNELS > 0)  # fmt: skip
    sigma = tl.load(sigmas + sample * sigma_stride)
    sigma_next = tl.load(sigmas_next + sample * sigma_next_stride)
    now = _embed(sigma, map_weight, map_bias, FREQUENCIES, NOISE, E, ACC)
    later = _embed(sigma_next, map_weight, map_bias, FREQUENCIES, NOISE, E, ACC)

    r = _head(r_weight, r_bias, encoded, now, later, ENCODED, K, NOISE, E)
    scale_dir = tl.full((), 1.0, ACC)
    scale_time = tl.full((), 1.0, ACC)
    if SCALE_DIR != 0:
        share = _head(dir_weight, dir_bias, encoded, now, later, ENCODED, K, NOISE, E)
        scale_dir = tl.full((), 2 * SCALE_DIR, ACC) * share + tl.full((), 1 - SCALE_DIR, ACC)
    if SCALE_TIME != 0:
        share = _head(time_weight, time_bias, encoded, now, later, ENCODED, K, NOISE, E)
        scale_time = tl.full((), 2 * SCALE_TIME, ACC) * share + tl.full((), 1 - SCALE_TIME, ACC)

    ratio = tl.exp(r * tl.log(sigma_next / sigma))
    mid = sigma * ratio
    slope = scale_dir * (sigma_next - sigma) / mid
    result += sample
    tl.store(result, r)
    tl.store(result + batch, scale_dir)
    tl.store(result + 2 * batch, scale_time)
    tl.store(result + 3 * batch, mid)
    tl.store(result + 4 * batch, scale_time * mid)
    tl.store(result + 5 * batch, ratio)
    tl.store(result + 6 * batch, 1 - ratio)
    tl.store(result + 7 * batch, tl.full((), 1.0, ACC))
    tl.store(result + 8 * batch, slope)
    tl.store(result + 9 * batch, -slope)


def constants(
    weights: MidpointWeights, dtype: torch.dtype, channels: int, scale_dir: float, scale_time: float
) -> dict[str, Any]:
    """The compile-time arguments of the kernel for one predictor: its shape, frequencies and ranges of scales.

    channels: those of the features, 0 for none.
    """
    hidden, pixels = weights.enc_layer0_weight.shape
    encoded, noise = weights.enc_layer1_weight.shape[0], weights.map_layer0_weight.shape[0]
    padded = triton.next_power_of_2(pixels)
    return {
        "PIXELS": pixels,
        "P": padded,
        "HIDDEN": hidden,
        "ENCODED": encoded,
        "K": triton.next_power_of_2(encoded),
        "NOISE": noise,
        "E": triton.next_power_of_2(noise),
        "ROWS": max(1, TILE // max(padded, triton.next_power_of_2(encoded))),  # a side of both matrices, in registers
        "ACC": TL_DTYPES[dtype],
        "CHANNELS": channels,
        "FREQUENCIES": frequency_values(noise),
        "SCALE_DIR": float(scale_dir),
        "SCALE_TIME": float(scale_time),
    }


def midpoint_into(
    features: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weights: MidpointWeights,
    scale_dir: float,
    scale_time: float,
    table: Tensor,
) -> None:
    """`reference.midpoint_table` in one launch; features (B, C, h, w), each sample contiguous like every weight."""
    batch, channels = table.shape[1], 0 if features is None else features.shape[1]
    # Absent features and an absent head are never read; the kernel still wants an address.
    maps, *parameters = (table if tensor is None else tensor for tensor in (features, *weights))
    with torch.cuda.device_of(sigma):
        midpoint_kernel[(batch,)](
            maps,
            maps.stride(0),
            weights.enc_layer0_weight.shape[1],
            sigma,
            *batch_strides(sigma),
            sigma_next,
            *batch_strides(sigma_next),
            *parameters,
            table,
            batch,
            **constants(weights, sigma.dtype, channels, scale_dir, scale_time),
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
