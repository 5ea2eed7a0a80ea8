"""Which model a predictor was trained for: a hash of its parameters, and of the settings of our wrappers round it.

Settings are a buffer of the wrapper: unlike attributes, buffers are still there when it was traced or exported.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from amed_engine.adapters.weights import OnDisk, readable, weights_of
from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import Bound, as_module, bare, gathered, placed, plain_name, unknown_wrapper
from amed_engine.sampling.modules import whole as in_one_piece
from amed_engine.sampling.wrappers import computes_nothing, passed_on

BUFFER, TOLD = "amed_settings", "amed_settings_told"
WRAPPED = "(wrapper)"


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
    """Register the SHA-256 of JSON-able settings as the buffer `amed_settings` (32,) uint8 of the module, outside state dicts;
    their text stays beside it, for people.

    A predictor is for one setting: whatever changes the answer of the wrapper round the same network belongs here.
    """
    setattr(module, TOLD, json.dumps([type(module).__name__, settings], sort_keys=True))
    module.register_buffer(BUFFER, hashed(getattr(module, TOLD)), persistent=False)


def hashed(text: str) -> Tensor:
    """SHA-256, (32,) uint8."""
    return torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


def summary(table: Tensor) -> list[str]:
    """A table by its length and nine of its values to three digits: float32 and float64 arithmetic give the same."""
    places = torch.linspace(0, len(table) - 1, 9, dtype=torch.float32, device="cpu").round().long()
    return [str(len(table)), *(f"{value:.2e}" for value in table[places].tolist())]


def fingerprint(model: Any) -> str | None:
    """SHA-256 over names, shapes, dtypes and bytes of a model's parameters, and over the settings of our adapters, guidance
    and thresholding in it; None for a callable without parameters, or one whose parameters cannot be read.

    Compiled, traced, exported and wrapped forms of a module (DataParallel, FSDP, AveragedModel) have its fingerprint, and so
    have one that accelerate offloads, and the files of `save_package`, `save_program` and `save_onnx`.
    """
    if (recorded := getattr(bare(model), "recorded", None)) is not None and unknown_wrapper(model) is None:
        return recorded
    with gathered(model):
        weights = model_weights(model)
        return digest(weights | settings_of(model)) if weights and readable(weights) else None


def is_model(model: Any, recorded: str) -> bool:
    """Whether `recorded` is the fingerprint of this model; the older form, of its parameters alone, counts as well."""
    if (own := getattr(bare(model), "recorded", None)) is not None and unknown_wrapper(model) is None:
        return recorded == own
    with gathered(model):
        weights, settings = model_weights(model), settings_of(model)
        # Hashing reads every weight: the older form only where it differs and the newer one did not match.
        older = bool(settings) and not any(name.endswith(WRAPPED) for name in settings)
        return recorded == digest(weights | settings) or (older and recorded == digest(weights))


def can_tell(model: Any) -> bool:
    """Whether a model is a module, and all of its weights can be read."""
    return isinstance(as_module(model), nn.Module) and readable(model_weights(model))


def model_weights(model: Any) -> dict[str, Tensor | OnDisk]:
    module = as_module(model)
    return weights_of(module) | _recorded(module) if isinstance(module, nn.Module) else {}


def _recorded(module: nn.Module) -> dict[str, Tensor | OnDisk]:
    """What files of compiled parts say in place of weights."""
    told = ((prefix, getattr(part, "recorded", None)) for prefix, part, _ in placed(module))
    return {f"{prefix}(recorded)": _bytes(text) for prefix, text in told if text is not None}


def own_parts(model: Any) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """This package's parts of a model that keep settings: name of the buffer, part, buffer."""
    module = as_module(model)
    for prefix, part, whole in placed(module) if isinstance(module, nn.Module) else ():
        for name, buffer in part.named_buffers(recurse=whole):
            *owners, last = name.split(".")
            if last == BUFFER:  # TorchScript has no get_submodule
                yield prefix + plain_name(part, name), functools.reduce(getattr, owners, part), buffer


def settings_of(model: Any) -> dict[str, Tensor]:
    """Those of this package's parts, what partials give, and the names of wrappers that may compute something."""
    module, settings = as_module(model), {name: buffer for name, _, buffer in own_parts(model)}
    for prefix, part, whole in placed(module) if isinstance(module, nn.Module) else ():
        if passed_on(part) is not None and not computes_nothing(part):
            settings[f"{prefix}{type(part).__name__}{WRAPPED}"] = _bytes(type(part).__name__)
        for name, inner in part.named_modules() if whole else (("", part),):
            settings |= _given((prefix + plain_name(part, name)).rstrip("."), inner)
    return settings


def _given(name: str, part: nn.Module) -> dict[str, Tensor]:
    keywords = part.keywords if isinstance(part, Bound) else {}
    return {f"{name}({key}){place}": told for key, value in keywords.items() for place, told in _leaves(value)}


def _leaves(value: Any) -> Iterator[tuple[str, Tensor]]:
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


def digest(tensors: Mapping[str, Tensor | OnDisk]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        kept = tensors[name]
        tensor = kept.read() if isinstance(kept, OnDisk) else in_one_piece(kept)
        for part, value in _plain_parts(name, tensor.detach()):
            value = value.cpu().contiguous()
            sha.update(f"{part}:{value.dtype}:{tuple(value.shape)};".encode())
            sha.update(value.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the tensors that a quantised one consists of."""
    if tensor.is_quantized:
        yield f"{name}.integers", tensor.int_repr()
        yield from ((f"{name}.{part}", value) for part, value in _scales(tensor))
        return
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for part in flatten()[0]:
        yield from _plain_parts(f"{name}.{part}", getattr(tensor, part))


def _scales(tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Scale and zero of a tensor of torch.quantize_per_tensor, those of each channel of torch.quantize_per_channel."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [("scale", torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64))]
    return [("scales", tensor.q_per_channel_scales()), ("zeros", tensor.q_per_channel_zero_points())]
