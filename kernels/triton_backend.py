"""What `ops.py` calls on CUDA; imported when first needed, because importing Triton takes a second."""

from .triton_combine import coeff_grad_into, combine_into
from .triton_midpoint import midpoint_into

__all__ = ["coeff_grad_into", "combine_into", "midpoint_into"]
