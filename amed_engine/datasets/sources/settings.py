"""Switches of a pipeline and its parts: what decides samples and stands in neither configurations nor weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amed_engine.adapters.fingerprint import digest
from amed_engine.engine.identity import MAX_ENTRIES, hashed

# Of every module, of where it was loaded from, told elsewhere, and of parts that wait on another device.
OTHERS = {
    *vars(nn.Module()), "_internal_dict", "config", "generation_config", "name_or_path", "_name_or_path",
    "_progress_bar_config", "_is_hf_initialized", "forward", "_hf_hook", "_old_forward", "hf_device_map", "_all_hooks",
    "_offload_gpu_id", "_offload_device", "_weight_conversions", "_use_kernels",
}  # fmt: skip
NOTES = ("transformers_version", "architectures", "dtype")  # in a configuration: of who saved it, and how
CALLED = ("timesteps", "sigmas")  # tables that every call of a scheduler makes anew

Settings = dict[str, Any]


def configuration_of(part: Any) -> Settings:
    """What a part, or the pipeline, was made of: without notes of where and by which version it was saved, and without the
    names of components."""
    config: Any = getattr(part, "config", None)
    told = config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
    components = getattr(part, "components", {})
    return {name: told[name] for name in told if not (name.startswith("_") or name in NOTES or name in components)}


def settings_of(pipeline: Any) -> dict[str, Settings]:
    """Of each part, and under "" of the pipeline, values by their dotted names: the factors of FreeU, scales of adapters, tiles
    of an autoencoder, processors of attention, tables of a scheduler that were written to.

    What a call leaves is among them: compare two that were taken after the same calls.
    """
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    own = {"": dict(_values(pipeline, ignored=frozenset(pipeline.components)))}
    return own | {name: dict(_told(part)) for name, part in parts.items()}


def unusual(pipeline: Any, settings: dict[str, Settings]) -> dict[str, Settings]:
    """Those which a part does not have that was just made of the same configuration; all of one that cannot be made. Of many
    the SHA-256."""
    found = {}
    for name, own in settings.items():
        usual = dict(_told(_fresh(pipeline.components[name]))) if name else {}
        others = {key: value for key, value in own.items() if not _same(value, usual.get(key, _same))}
        told = {key: _plain(value) for key, value in others.items()}
        found[name] = {"all": hashed(told)} if len(told) > MAX_ENTRIES else told
    return {name: own for name, own in found.items() if own}


def lasting(before: dict[str, Settings], after: dict[str, Settings]) -> dict[str, Settings]:
    """Those that a call leaves as they were: the others count calls, or keep what was drawn."""
    return {
        name: {key: value for key, value in own.items() if _same(value, before[name].get(key, _same))}
        for name, own in after.items()
    }


def _told(part: Any) -> Iterator[tuple[str, Any]]:
    """Of a module by layers, with their classes; of a scheduler its attributes and tables; of a tokenizer how it cuts."""
    if isinstance(part, nn.Module):
        for name, layer in part.named_modules():
            yield f"{name}.class".lstrip("."), type(layer).__name__
            for key, value in _values(layer):
                yield f"{name}.{key}".lstrip("."), value
    elif hasattr(part, "set_timesteps"):
        yield from _values(part)
        for key, table in vars(part).items():
            if key not in CALLED and isinstance(table, (Tensor, np.ndarray)):
                yield key, torch.as_tensor(table).cpu()
    elif hasattr(part, "get_vocab"):
        yield from ((key, getattr(part, key, None)) for key in ("model_max_length", "padding_side", "truncation_side"))


def _values(thing: Any, ignored: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    for name, value in vars(thing).items() if hasattr(thing, "__dict__") else ():
        if name not in OTHERS and name not in ignored and not isinstance(value, (Tensor, np.ndarray, nn.Module)):
            yield name, _plain(value)


def _plain(value: Any, depth: int = 0) -> Any:
    """JSON-able; a function by its name, another object by its class and its values."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no number for it
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return f"sha256:{digest({'': value})}"
    if depth > 3:
        return type(value).__name__
    if isinstance(value, (list, tuple)):
        return [_plain(entry, depth + 1) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(_plain(entry, depth + 1)) for entry in value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value) if isinstance(value, torch.dtype) else None
    name = getattr(value, "__qualname__", type(value).__qualname__)
    inner = {key: _plain(entry, depth + 1) for key, entry in (*_values(value), *configuration_of(value).items())}
    return [name, inner] if inner else name


def _same(one: Any, other: Any) -> bool:
    """Tables too where they are as near as processors round them."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other.to(one), rtol=1e-4, atol=0.0)
    return type(one) is type(other) and one == other


def _fresh(part: Any) -> Any:
    """A part of the same class and configuration, without weights; None where it cannot be made so."""
    kind, config = type(part), getattr(part, "config", None)
    made = kind.from_config if isinstance(config, Mapping) and hasattr(kind, "from_config") else kind
    weightless = torch.device("meta") if isinstance(part, nn.Module) else nullcontext()
    try:
        with torch.random.fork_rng(devices=[]), weightless:
            return made(copy.deepcopy(config)) if config is not None else None
    except Exception:  # whatever a class of somebody else's raises
        return None
