"""A torch-free sampler on CuPy arrays, for hosts whose network is a TensorRT or ONNX Runtime engine.

    stepper = amed_engine.integrations.cupy.stepper(read_plan("plan.json"), x)
    while not stepper.done:
        stepper.advance(engine(stepper.points, stepper.sigma))

The CUDA C++ of csrc/cuda is compiled for the device at hand by NVRTC, once a process. Everything is queued on CuPy's
current stream and nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from amed_engine.engine.export.locations import get_include
from amed_engine.engine.export.stepper import Array, Stepper
from amed_engine.engine.export.tableau import Tableau
from amed_engine.errors import require

_THREADS, _VEC = 256, 8  # kThreads and kVec of csrc/cuda
_CODES = {"float32": 0, "float64": 1}

# amed::View and amed::CombineArgs of csrc/include/amed, passed to the kernel by value.
VIEW = np.dtype([("data", "u8"), ("batch_stride", "i8"), ("dtype", "i4")], align=True)
COMBINE_ARGS = np.dtype(
    [
        ("sources", "i4"),
        ("outputs", "i4"),
        ("batch", "i8"),
        ("size", "i8"),
        ("source", VIEW, 16),
        ("output", VIEW, 8),
        ("coeffs", "u8"),
        ("coeff_stride", "i8", 3),
        ("wide", "?"),
    ],
    align=True,
)


def stepper(plan: Tableau, x: Array, classes: Any = None) -> Stepper:
    """A `Stepper` for x (B, ...), a CuPy array of float32 or float64, whose updates are one fused kernel each.

    classes: as `Stepper` takes them; nothing waits for those in a CuPy array. An array of another library on the same device
    comes without a copy through `cupy.from_dlpack`. Raises ConfigError.
    """
    return Stepper(plan, x, classes, xp=_cupy(), combine=combine)


def combine(sources: Sequence[Array], coeffs: Array, outputs: Sequence[Array]) -> None:
    """outputs[m][b] = Σ_j coeffs[m, j, b] · sources[j][b] in one launch: every source read once, every output written once.

    coeffs: (M, J, B or 1) in the dtype of the sources. Sources that are not C-contiguous are copied first.
    """
    first = outputs[0]
    if first.size == 0:
        return
    # Named, since only addresses are handed on: a copy made here must outlive the launch.
    dense = [source if source.flags.c_contiguous else source.copy(order="C") for source in sources]
    args = _pack(dense, coeffs, outputs)
    kind = "double" if first.dtype == "float64" else "float"
    rows = next(m for m in (1, 2, 4, 8) if m >= len(outputs))
    blocks = len(first) * -(-int(args["size"][0]) // (_THREADS * _VEC))
    kernel = _kernel(f"amed_combine_{kind}_{rows}")
    kernel((blocks,), (_THREADS,), (args.view(np.dtype((np.void, COMBINE_ARGS.itemsize))),))


def _pack(sources: Sequence[Array], coeffs: Array, outputs: Sequence[Array]) -> np.ndarray:
    """The kernel's argument, (1,) of COMBINE_ARGS."""
    args, first = np.zeros(1, COMBINE_ARGS), outputs[0]
    batch, size = len(first), first.size // len(first)
    args["sources"], args["outputs"], args["batch"], args["size"] = len(sources), len(outputs), batch, size
    for name, arrays in (("source", sources), ("output", outputs)):
        for k, array in enumerate(arrays):
            args[name][0, k] = (address(array), size, _CODES[str(array.dtype)])
    stride = [step // coeffs.itemsize for step in coeffs.strides]
    args["coeffs"] = address(coeffs)
    args["coeff_stride"] = (*stride[:2], stride[2] if coeffs.shape[2] > 1 else 0)
    args["wide"] = first.dtype == "float64"
    return args


def address(array: Array) -> int:
    """Of an array's first element, by the protocol that CuPy and NumPy have in common."""
    interface = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
    return interface["data"][0]


@lru_cache
def _kernel(name: str) -> Any:
    """A kernel compiled at run time from the sources that the package carries; CuPy picks the current device."""
    csrc = Path(get_include()).parent
    options = ("-std=c++17", f"-I{csrc / 'include'}", f"-I{csrc / 'cuda'}")
    return _cupy().RawModule(code=(csrc / "cuda" / "combine.cu").read_text(), options=options).get_function(name)


def _cupy() -> Any:
    return require("cupy", "gpu")
