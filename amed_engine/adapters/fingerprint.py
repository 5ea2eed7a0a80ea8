"""Which model a predictor was trained for: a hash of its parameters, and of the settings of our wrappers round it.

Settings are a buffer of the wrapper: unlike attributes, buffers are still there when it was traced or exported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import Bound, as_module, gathered, is_lazy, plain_name, whole

BUFFER = "amed_settings"


class Settled(nn.Module):
    """A module whose `fixed` attributes are set once: fingerprints and captured graphs hold what they were."""

    fixed: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.fixed and name in self.__dict__:
            raise ConfigError(
                f"{name} of {type(self).__name__} is fixed once it is made: predictors and captured graphs are for "
                f"{name}={getattr(self, name)!r}; make another with {name}={value!r}"
            )
        super().__setattr__(name, value)


def keep_settings(module: nn.Module, **settings: Any) -> None:
    """Register the SHA-256 of JSON-able settings as the buffer `amed_settings` (32,) uint8 of the module, outside state dicts.

    A predictor is for one setting: whatever changes the answer of the wrapper round the same network belongs here.
    """
    text = json.dumps([type(module).__name__, settings], sort_keys=True)
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    module.register_buffer(BUFFER, digest, persistent=False)


def summary(table: Tensor) -> list[str]:
    """A table by its length and nine of its values to three digits: float32 and float64 arithmetic give the same."""
    places = torch.linspace(0, len(table) - 1, 9, dtype=torch.float32, device="cpu").round().long()
    return [str(len(table)), *(f"{value:.2e}" for value in table[places].tolist())]


def fingerprint(model: Any) -> str | None:
    """SHA-256 over names, shapes, dtypes and bytes of a model's parameters, and over the settings of our adapters, guidance
    and thresholding in it; None for a callable without parameters, or one whose parameters cannot be read.

    Compiled, traced, exported and wrapped forms of a module (DataParallel, FSDP, AveragedModel) have its fingerprint, and so
    has one that accelerate offloads.
    """
    with gathered(model):
        parameters = _parameters(model)
        return _digest(parameters | _settings(model)) if parameters and _readable(parameters) else None


def is_model(model: Any, recorded: str) -> bool:
    """Whether `recorded` is the fingerprint of this model; the older form, of its parameters alone, counts as well."""
    with gathered(model):
        parameters, settings = _parameters(model), _settings(model)
        # Hashing reads every weight: the older form only where it differs and the newer one did not match.
        return recorded == _digest(parameters | settings) or (bool(settings) and recorded == _digest(parameters))


def can_tell(model: Any) -> bool:
    """Whether a model is a module, and all of its parameters can be read."""
    return isinstance(as_module(model), nn.Module) and _readable(_parameters(model))


def _parameters(model: Any) -> dict[str, Tensor]:
    module = as_module(model)
    named = module.named_parameters() if isinstance(module, nn.Module) else ()
    return {plain_name(module, name): _brought(module, name, parameter) for name, parameter in named}


def _settings(model: Any) -> dict[str, Tensor]:
    module = as_module(model)
    if not isinstance(module, nn.Module):
        return {}
    own = {plain_name(module, name): b for name, b in module.named_buffers() if name.rpartition(".")[2] == BUFFER}
    given = [(name, part) for name, part in module.named_modules() if isinstance(part, Bound)]
    return own | {
        f"{plain_name(module, name)}({key}){place}": tensor
        for name, part in given
        for key, value in part.keywords.items()
        for place, tensor in _told(value)
    }


def _told(value: Any) -> Iterator[tuple[str, Tensor]]:
    """A keyword's value; where it holds arrays, each of its parts by its place."""
    leaves, _ = tree_flatten_with_path(value)
    if not any(isinstance(leaf, (Tensor, numpy.ndarray)) for _, leaf in leaves):
        leaves = [((), value)]
    for place, leaf in leaves:
        yield keystr(place), _bytes(leaf)


def _bytes(value: Any) -> Tensor:
    """A tensor; the text of plain data; of anything else, its type."""
    if isinstance(value, (Tensor, numpy.ndarray)):
        return torch.as_tensor(value, device=getattr(value, "device", "cpu"))
    plain = value is None or isinstance(value, (bool, int, float, str, list, tuple, dict))
    text = repr(value) if plain else type(value).__qualname__
    return torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)


def _brought(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter, that of an offloaded module from where accelerate keeps it."""
    if parameter.device.type != "meta":
        return parameter
    owner, _, own = name.rpartition(".")
    hook = getattr(module.get_submodule(owner), "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if (kept := getattr(each, "weights_map", None)) is not None:
            return kept[own]
    return parameter


def _readable(parameters: dict[str, Tensor]) -> bool:
    return not any(parameter.device.type == "meta" or is_lazy(parameter) for parameter in parameters.values())


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        for part, value in _plain_parts(name, whole(tensor).detach()):
            value = value.cpu().contiguous()
            digest.update(f"{part}:{value.dtype}:{tuple(value.shape)};".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the tensors that a quantised one consists of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for part in flatten()[0]:
        yield from _plain_parts(f"{name}.{part}", getattr(tensor, part))
