"""What a denoiser says of itself, kept in a buffer of its module: unlike attributes, buffers are still there when it was
traced or exported, and are part of the file.
"""

from __future__ import annotations

import json
import math
import weakref
from typing import Any

import torch
from torch import nn

BUFFER = "amed_facts"
LEVELS = ("sigma_min", "sigma_max")
SIZES = ("sample_shape", "bottleneck_size")
NAMES = (*SIZES, "channel_axis", "label_dim", "label_kind", "can_guide", "consistency", *LEVELS)
CONTINUOUS = ("float", "vector")  # kinds of labels that are no classes; these are rows in files

_read: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


class Telling(nn.Module):
    """A module whose facts, once `keep_facts` was called, are kept up to date."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in NAMES and BUFFER in self.__dict__.get("_buffers", ()):
            keep_facts(self)


def facts_in(denoiser: Any) -> dict[str, Any]:
    """Its shape of samples, classes, whether it can be guided, its bottleneck and noise levels, as JSON has them; levels
    without an end are left out."""
    told: dict[str, Any] = {name: getattr(denoiser, name, None) for name in NAMES}
    levels = {name: float(told[name]) for name in LEVELS if told[name] is not None}
    sizes = {name: told[name] and list(told[name]) for name in SIZES}
    kind = told["label_kind"] if told["label_kind"] in CONTINUOUS else None
    known = {**told, **sizes, "label_kind": kind, **dict.fromkeys(LEVELS)}
    known["consistency"] = told["consistency"] or None  # said of one-step generators alone
    known |= {name: level for name, level in levels.items() if 0 < level < math.inf}
    return {name: value for name, value in known.items() if value is not None}


def keep_facts(module: nn.Module) -> None:
    """Register them as the buffer `amed_facts` (N,) uint8, a JSON text, outside state dicts."""
    text = json.dumps(facts_in(module), sort_keys=True)
    module.register_buffer(BUFFER, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), persistent=False)


def kept(network: Any) -> dict[str, Any]:
    """The facts in the buffer of a traced or exported module, read once; none where there is no such buffer."""
    if not isinstance(network, nn.Module) or getattr(network, BUFFER, None) is None:
        return {}
    if isinstance(network, Telling):  # which says them itself
        return {}
    if network not in _read:
        _read[network] = as_facts(json.loads(bytes(getattr(network, BUFFER).tolist())))
    return _read[network]


def as_facts(data: Any) -> dict[str, Any]:
    """Facts that `facts_in` wrote. Raises ValueError for anything else."""
    if not isinstance(data, dict) or not all(name in NAMES and _is_fact(name, value) for name, value in data.items()):
        raise ValueError(f"facts of a denoiser are {', '.join(NAMES)}, got {str(data)[:80]}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def _is_fact(name: str, value: Any) -> bool:
    if name in ("can_guide", "consistency"):
        return isinstance(value, bool)
    if name == "label_kind":
        return value in CONTINUOUS
    if name in ("label_dim", "channel_axis"):
        return type(value) is int and value >= 0
    if name in LEVELS:
        return type(value) in (int, float) and 0 < value < math.inf
    return isinstance(value, list) and bool(value) and all(type(size) is int and size > 0 for size in value)
