"""The prediction in whatever a network returns: a tensor, a tuple, a dictionary or an object that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from amed_engine.errors import ConfigError


def prediction_of(output: Any) -> Any:
    """The tensor `sample` of a dictionary or object, else the only tensor in it; the first of a tuple; what is none as it is.

    Raises ConfigError for several tensors, none of them named so.
    """
    if isinstance(output, Tensor):
        return output
    named = _named(output)
    if named is None:
        return prediction_of(output[0]) if isinstance(output, (tuple, list)) and len(output) else output
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if "sample" in tensors:
        return tensors["sample"]
    if len(tensors) != 1:
        kinds = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in named.items()) or "nothing"
        raise ConfigError(
            f"the network returns {type(output).__name__} of {kinds}; expected its prediction as 'sample' or the only tensor; "
            "wrap a function that takes it out of the answer, such as lambda x, t: network(x, t)[name]"
        )
    return next(iter(tensors.values()))


def _named(output: Any) -> dict[str, Any] | None:
    """The named parts of an answer, None where it has none."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if isinstance(getattr(output, "sample", None), Tensor):
        return {"sample": output.sample}
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return None
