"""Which model a predictor was trained for: a hash of its parameters, and of the settings of our wrappers round it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.adapters.settings import BUFFER


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
