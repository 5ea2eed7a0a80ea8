"""Which model a predictor was trained for: a hash of its parameters, and of the settings of our wrappers round it.

Settings are a buffer of the wrapper: unlike attributes, buffers are still there when it was traced or exported.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amed_engine.errors import ConfigError

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
    places = torch.linspace(0, len(table) - 1, 9).round().long()
    return [str(len(table)), *(f"{value:.2e}" for value in table[places].tolist())]


def fingerprint(model: Any) -> str | None:
    """SHA-256 over names, shapes, dtypes and bytes of a model's parameters, and over the settings of our adapters, guidance
    and thresholding in it; None for a callable without parameters.

    Compiled, traced and exported forms of a module have its fingerprint.
    """
    parameters = _parameters(model)
    return _digest(parameters | _settings(model)) if parameters else None


def is_model(model: Any, recorded: str) -> bool:
    """Whether `recorded` is the fingerprint of this model; the older form, of its parameters alone, counts as well."""
    parameters, settings = _parameters(model), _settings(model)
    # Hashing reads every weight: the older form only where it differs and the newer one did not match.
    return recorded == _digest(parameters | settings) or (bool(settings) and recorded == _digest(parameters))


def _parameters(model: Any) -> dict[str, Tensor]:
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    return {_plain(name): parameter for name, parameter in named}


def _settings(model: nn.Module) -> dict[str, Tensor]:
    named = {_plain(name): buffer for name, buffer in model.named_buffers()}
    return {name: buffer for name, buffer in named.items() if name.rpartition(".")[2] == BUFFER}


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
