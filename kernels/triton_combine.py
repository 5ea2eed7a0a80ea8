"""Triton kernels of `combine` and `combine_coeff_grad`, and their launchers.

load -> accumulation dtype -> explicit fma -> store: bfloat16 arithmetic is wrong in Triton's interpreter, and whether a
product and a sum are fused by themselves depends on Triton's version. No autotuning: its timing would break a capture.
"""

# Triton compiles the kernels from their source; for a type checker they are not Python.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import batch_strides

BLOCK = 1024
NUM_WARPS = 4
TL_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def combine_kernel(sources, source_strides, outputs, output_strides, coeffs, stride_m, stride_j, stride_b, size,
                   BLOCK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """One program: BLOCK elements of one sample, every source read once and every output written once."""
    blocks = (size - 1) // BLOCK + 1  # tl.cdiv adds first, which leaves 32 bits for sizes near 2^31
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    coeffs += sample * stride_b
    totals = ()
    for _ in tl.static_range(len(outputs)):
        totals = totals + (tl.zeros((BLOCK,), ACC),)  # noqa: RUF005
    for j in tl.static_range(len(sources)):
        values = tl.load(sources[j] + sample * source_strides[j] + offsets, mask=inside, other=0.0).to(ACC)
        updated = ()
        for m in tl.static_range(len(outputs)):
            coeff = tl.load(coeffs + m * stride_m + j * stride_j)
            updated = updated + (tl.fma(values, coeff, totals[m]),)  # noqa: RUF005
        totals = updated
    # Stored last, since an output may be a source.
    for m in tl.static_range(len(outputs)):
        target = outputs[m] + sample * output_strides[m] + offsets
        tl.store(target, totals[m].to(outputs[m].dtype.element_ty), mask=inside)


@triton.jit
def dot_kernel(left, left_stride, right, right_stride, result, size,
               BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """One program: the dot product of one sample, summed in a fixed order."""
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), ACC)
    for _ in range(BLOCKS):
        inside = offsets < size
        a = tl.load(left + sample * left_stride + offsets, mask=inside, other=0.0).to(ACC)
        b = tl.load(right + sample * right_stride + offsets, mask=inside, other=0.0).to(ACC)
        total = tl.fma(a, b, total)
        offsets += BLOCK
    tl.store(result + sample, tl.sum(total, axis=0))


def combine_into(sources: Sequence[Tensor], coeffs: Tensor, out: Sequence[Tensor]) -> None:
    """`reference.combine` of checked arguments whose samples are dense in one order, none empty."""
    batch = sources[0].shape[0]
    size = sources[0].numel() // batch
    with torch.cuda.device_of(coeffs):
        combine_kernel[(batch * triton.cdiv(size, BLOCK),)](
            tuple(sources),
            tuple(source.stride(0) for source in sources),
            tuple(out),
            tuple(target.stride(0) for target in out),
            coeffs,
            *batch_strides(coeffs),
            size,
            BLOCK=BLOCK,
            ACC=TL_DTYPES[coeffs.dtype],
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def coeff_grad_into(grads: Sequence[Tensor], sources: Sequence[Tensor], result: Tensor) -> None:
    """`reference.combine_coeff_grad` of such arguments: one launch per pair, since it runs in training only."""
    batch = grads[0].shape[0]
    size = grads[0].numel() // batch
    with torch.cuda.device_of(result):
        for m, grad in enumerate(grads):
            for j, source in enumerate(sources):
                dot_kernel[(batch,)](
                    grad, grad.stride(0), source, source.stride(0), result[m, j], size,
                    BLOCKS=triton.cdiv(size, BLOCK), BLOCK=BLOCK, ACC=TL_DTYPES[result.dtype], num_warps=NUM_WARPS,
                    enable_fp_fusion=False,
                )  # fmt: skip
