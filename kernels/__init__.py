"""Fused operations of the sampling loop: `combine` (linear updates) and `midpoint` (the AMED predictor).

Installed as `amed_engine.kernels`. Nothing here knows diffusion solvers: the operations are defined in
plain torch in `reference.py`; faster implementations exist in C++ (CPU), Triton and CUDA C++.
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package amed_engine.kernels and is shadowing another package called 'kernels'; "
        "use `from amed_engine import kernels`, or leave the root of the checkout off sys.path"
    )

from .ops import backends, combine, combine_coeff_grad, decompositions, midpoint, use
from .reference import MidpointStep, MidpointWeights

__all__ = [
    "MidpointStep",
    "MidpointWeights",
    "backends",
    "combine",
    "combine_coeff_grad",
    "decompositions",
    "midpoint",
    "use",
]
