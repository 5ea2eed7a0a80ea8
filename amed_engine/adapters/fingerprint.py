"""The settings of a wrapper as a buffer of it: unlike attributes, buffers are still there when it was traced or exported."""

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
