"""The tensors of modules that were read as records, under the names that a state dict gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from amed_engine.checkpoints.plain_data import MAX_NAME, Record, Visits
from amed_engine.errors import FileFormatError

MAX_LAYERS = 12  # of modules inside modules; published networks have 4


def module_tensors(module: Any) -> dict[str, Tensor]:
    """The state dict of a module that was read as a Record."""
    return dict(_tensors(module, "", 0, Visits()))


def _tensors(module: Any, prefix: str, depth: int, visits: Visits) -> Iterator[tuple[str, Tensor]]:
    state = module.state if isinstance(module, Record) else None
    if not isinstance(state, dict) or depth > MAX_LAYERS or len(prefix) > MAX_NAME:
        raise FileFormatError(f"{prefix[:80] or 'the model'} is no module with parameters")
    own, buffers, modules = (_dict(state, name, visits) for name in ("_parameters", "_buffers", "_modules"))
    passing = state.get("_non_persistent_buffers_set") or ()
    if not isinstance(passing, (set, list, tuple)) or not all(isinstance(name, str) for name in passing):
        raise FileFormatError(f"{prefix[:80] or 'the model'} lists its buffers as a {type(passing).__name__}")
    visits.count(passing, prefix)
    left_out = set(passing)
    for name, tensor in {**own, **buffers}.items():
        if isinstance(tensor, Tensor) and name not in left_out:
            yield prefix + name, tensor
    for name, child in modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", depth + 1, visits)


def _dict(state: Mapping[str, Any], name: str, visits: Visits) -> dict[str, Any]:
    value = state.get(name)
    visits.count(value, name)
    return value if isinstance(value, dict) and all(isinstance(key, str) for key in value) else {}
