"""What `ops.py` calls on CUDA; imported when first needed, because importing Triton takes a second."""

from .triton_combine import combine_coeff_grad, combine_into
from .triton_midpoint import midpoint_table

__all__ = ["combine_coeff_grad", "combine_into", "midpoint_table"]
