"""CUDA C++ of csrc/cuda, launched through amed_cuda.so (built by setup.py where nvcc is) or compiled by CuPy (NVRTC).

An alternative to the Triton kernels, for comparison and for machines without Triton: `use("cuda")`.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layout import MAX_OUTPUTS, MAX_SOURCES, batch_strides
from .reference import MidpointWeights, frequency_values

_LIBRARY = Path(__file__).with_name("amed_cuda.so")
_SOURCES = Path(__file__).parents[1] / "csrc"  # beside kernels/, in a checkout and in an installation
_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_THREADS, _VEC = 256, 8  # kThreads and kVec of csrc/cuda
_MAX_NOISE_CHANNELS, _MAX_SHARED = 64, 48 << 10  # what fits the arguments and, in bytes, one block of any GPU


# The structures of csrc/include/amed, field for field.


class View(Structure):
    _fields_ = (("data", c_void_p), ("batch_stride", c_int64), ("dtype", c_int32))


class CombineArgs(Structure):
    _fields_ = (
        ("sources", c_int),
        ("outputs", c_int),
        ("batch", c_int64),
        ("size", c_int64),
        ("source", View * MAX_SOURCES),
        ("output", View * MAX_OUTPUTS),
        ("coeffs", c_void_p),
        ("coeff_stride", c_int64 * 3),
        ("wide", c_bool),
    )


class DotArgs(Structure):
    _fields_ = (("operands", CombineArgs), ("result", c_void_p))


class MidpointArgs(Structure):
    _fields_ = (
        ("batch", c_int64),
        ("channels", c_int),
        ("pixels", c_int),
        ("features", View),
        ("channel_stride", c_int64),
        ("noise_channels", c_int),
        ("hidden", c_int),
        ("encoded", c_int),
        ("wide", c_bool),
        ("sigma", c_void_p),
        ("sigma_next", c_void_p),
        ("sigma_stride", c_int64),
        ("sigma_next_stride", c_int64),
        ("frequencies", POINTER(c_double)),
        *(
            (name, c_void_p)
            for name in ("map_weight", "map_bias", "enc0_weight", "enc0_bias", "enc1_weight", "enc1_bias")
        ),
        ("head_weight", c_void_p * 3),
        ("head_bias", c_void_p * 3),
        ("width", c_double * 3),
        ("result", c_void_p),
    )


class Frequencies(Structure):
    _fields_ = (("values", c_double * 32),)


def maker() -> str:
    """Whose kernels these are: of the library that nvcc made, of CuPy, or of nobody ("")."""
    return _LIBRARY.name if _LIBRARY.exists() else "CuPy" if find_spec("cupy") else ""


def why_not() -> str:
    """Why this implementation cannot be used; empty where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return "" if maker() else f"neither {_LIBRARY.name} (reinstall with nvcc and AMED_CUDA=1) nor CuPy is there"


# ---- operations ----


def combine_into(sources: Sequence[Tensor], coeffs: Tensor, out: Sequence[Tensor]) -> None:
    """`reference.combine` of checked arguments whose samples are dense in one order, none empty."""
    args = _operands(sources, out, coeffs.dtype == torch.float64)
    args.coeffs = coeffs.data_ptr()
    args.coeff_stride[:] = batch_strides(coeffs)
    _launch("combine", args, coeffs.device)


def coeff_grad_into(grads: Sequence[Tensor], sources: Sequence[Tensor], result: Tensor) -> None:
    """`reference.combine_coeff_grad` of such arguments."""
    args = DotArgs(_operands(sources, grads, result.dtype == torch.float64), result.data_ptr())
    _launch("combine_coeff_grad", args, result.device)


def midpoint_into(
    features: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weights: MidpointWeights,
    scale_dir: float,
    scale_time: float,
    table: Tensor,
) -> None:
    """`reference.midpoint_table` in one launch; features (B, C, h, w), each sample contiguous like every weight.

    Raises ValueError for a predictor too large for a block.
    """
    pixels = weights.enc_layer0_weight.shape[1]
    args = MidpointArgs(batch=table.shape[1], pixels=pixels, wide=sigma.dtype == torch.float64)
    args.noise_channels, args.hidden, args.encoded = (len(bias) for bias in weights[1:6:2])  # pyright: ignore
    if args.noise_channels > _MAX_NOISE_CHANNELS or _shared_bytes(args) > _MAX_SHARED:
        raise ValueError(
            f"a predictor of {args.noise_channels} noise channels on {args.pixels} pixels is too large for one block of "
            "CUDA C++ (64 channels, 48 KiB in all); use Triton or the plain definition"
        )
    if features is not None:
        args.features, args.channels, args.channel_stride = _view(features), features.shape[1], pixels
    args.sigma, (args.sigma_stride,) = sigma.data_ptr(), batch_strides(sigma)
    args.sigma_next, (args.sigma_next_stride,) = sigma_next.data_ptr(), batch_strides(sigma_next)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in weights]
    args.map_weight, args.map_bias, args.enc0_weight, args.enc0_bias, args.enc1_weight, args.enc1_bias = addresses[:6]
    args.head_weight[:], args.head_bias[:] = addresses[6::2], addresses[7::2]
    args.width[:] = (0.0, scale_dir, scale_time)
    frequencies = (c_double * (_MAX_NOISE_CHANNELS // 2))(*frequency_values(args.noise_channels))
    args.frequencies = frequencies
    args.result = table.data_ptr()
    _launch("midpoint", args, sigma.device)


def _shared_bytes(args: MidpointArgs) -> int:
    """Shared memory of one block, as `amed_cuda_midpoint` counts it."""
    slices = max(1, _THREADS // -(-args.pixels // _VEC))
    values = args.encoded + 4 * args.noise_channels + 3 + args.hidden + slices * args.pixels
    return values * (8 if args.wide else 4)


def _operands(sources: Sequence[Tensor], outputs: Sequence[Tensor], wide: bool) -> CombineArgs:
    batch = sources[0].shape[0]
    args = CombineArgs(len(sources), len(outputs), batch, sources[0].numel() // batch, wide=wide)
    for k, source in enumerate(sources):
        args.source[k] = _view(source)
    for k, output in enumerate(outputs):
        args.output[k] = _view(output)
    return args


def _view(tensor: Tensor) -> View:
    return View(tensor.data_ptr(), tensor.stride(0), _CODES[tensor.dtype])


# ---- launching ----


def _launch(name: str, args: Structure, device: torch.device) -> None:
    """On torch's current stream, never synchronizing."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        if not _LIBRARY.exists():
            _launch_cupy(name, args, stream)
            return
        code = getattr(_library(), f"amed_cuda_{name}")(byref(args), c_void_p(stream))
    if code:
        raise RuntimeError(
            f"launching {name} of {_LIBRARY.name} failed with cudaError {code}; was it built for this GPU?"
        )


@lru_cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_LIBRARY))


def _launch_cupy(name: str, args: Any, stream: int) -> None:
    import cupy

    kind = "double" if (args.operands if name == "combine_coeff_grad" else args).wide else "float"
    if name == "combine":
        outputs = next(m for m in (1, 2, 4, 8) if m >= args.outputs)
        grid: tuple[int, ...] = (args.batch * -(-args.size // (_THREADS * _VEC)),)
        kernel, shared, arguments = _kernel("combine", f"amed_combine_{kind}_{outputs}"), 0, (args,)
    elif name == "combine_coeff_grad":
        operands = args.operands
        grid = (operands.batch, operands.outputs * operands.sources)
        kernel, shared, arguments = _kernel("combine", f"amed_dot_{kind}"), 0, (args,)
    else:
        grid, shared = (args.batch,), _shared_bytes(args)
        table = Frequencies()
        table.values[: args.noise_channels // 2] = args.frequencies[: args.noise_channels // 2]
        kernel, arguments = _kernel("midpoint", f"amed_midpoint_{kind}"), (args, table)
    with cupy.cuda.ExternalStream(stream):
        kernel(grid, (_THREADS,), tuple(_by_value(argument) for argument in arguments), shared_mem=shared)


def _by_value(structure: Structure) -> Any:
    """CuPy passes a numpy structure by value."""
    import numpy as np

    return np.frombuffer(bytes(structure), dtype=np.dtype((np.void, ctypes.sizeof(structure))))


@lru_cache
def _kernel(source: str, name: str) -> Any:
    """A kernel compiled at run time from the sources that the package carries."""
    import cupy

    options = ("-std=c++17", f"-I{_SOURCES / 'include'}", f"-I{_SOURCES / 'cuda'}")
    code = (_SOURCES / "cuda" / f"{source}.cu").read_text()
    return cupy.RawModule(code=code, options=options).get_function(name)
