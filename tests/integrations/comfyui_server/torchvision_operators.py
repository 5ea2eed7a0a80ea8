"""For ComfyUI, which imports torchvision for nodes that these tests do not run, beside a torch that it was not built for."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec

import torch

_KEPT: list[torch.library.Library] = []  # an operator lasts as long as its library


def declare() -> None:
    """Declare the two operators that torchvision's Python part asks for while it is imported.

    The package index has torchvision for CUDA only: beside a torch for CPUs its library does not load, and importing it
    fails on them.
    """
    if torch.version.cuda is not None or find_spec("torchvision") is None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it is there
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
