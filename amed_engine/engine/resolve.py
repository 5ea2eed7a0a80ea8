"""From whatever a caller has (a name, a file, a module, a program) to one callable and what is known of it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import amed_engine.zoo as zoo
from amed_engine.adapters import Signature, is_package, load_compiled, load_onnx
from amed_engine.adapters.compiled import check_size
from amed_engine.adapters.conditions import class_index
from amed_engine.adapters.exporting import check_no_loop
from amed_engine.adapters.facts import check_classes_known, is_raw
from amed_engine.adapters.labels import KINDS
from amed_engine.adapters.sealed import check_seal
from amed_engine.checkpoints import load_model, load_program
from amed_engine.checkpoints.adapted import is_adapter, load_adapter
from amed_engine.checkpoints.exported_program import extra_names
from amed_engine.engine.model import Model
from amed_engine.errors import ConfigError
from amed_engine.sampling.kept import kept
from amed_engine.sampling.modules import as_module, bare, bound, module_of, never_writes, said
from amed_engine.solvers.targets import check_source


def resolve(
    model: Any,
    *,
    shape: tuple[int, ...] | None = None,
    label_dim: int | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    weights: str | os.PathLike | None = None,
    ready: bool = True,
) -> Model:
    """A Model from a zoo name, a path, an nn.Module (compiled and scripted ones too), an ExportedProgram or a callable.

    What is not given is read from the module's attributes, which EDM's networks have: img_channels, img_resolution,
    label_dim, sigma_min, sigma_max. weights: of a published model's name, as `zoo.load` takes them. ready: a network that takes
    conditions must have some bound to it, since no call brings them. Modules are put into evaluation mode. Raises ConfigError.
    """
    name = model if isinstance(model, str) and model in zoo.names() else None
    network = as_module(opened(model, weights))
    if isinstance(network, type):
        raise ConfigError(
            f"model is the class {network.__name__}, not a model; pass an instance, {network.__name__}(...)"
        )
    if not callable(network):
        raise ConfigError(
            f"model must be a zoo name, a path, an nn.Module, an ExportedProgram or a callable, got {type(model).__name__}"
        )
    if is_raw(network):
        raise ConfigError(
            f"{type(bare(network)).__name__} is a raw network, no denoiser: amed_engine.wrap(network, prediction=...) makes "
            "one, --prediction on the command line"
        )
    if (module := module_of(network)) is not None:
        with contextlib.suppress(NotImplementedError):  # exported programs have no modes
            module.eval()
    if ready and isinstance(check := said(network, "check_ready"), MethodType):  # an adapter knows what it lacks
        check()
    own_labels = 0 if "class_labels" in bound(network) else int(said(network, "label_dim", 0))
    if label_dim is None and not own_labels:
        check_classes_known(network)
    count = _label_dim(label_dim, own_labels)
    return Model(
        network=network,
        shape=check_size(network, _sample_shape(shape, _image_shape(network), int(said(network, "channel_axis", 0)))),
        label_dim=count,
        label_kind=_label_kind(network, count),
        sigma_min=_sigma("sigma_min", sigma_min, said(network, "sigma_min", 0.002)),
        sigma_max=_sigma("sigma_max", sigma_max, said(network, "sigma_max", math.inf)),
        name=name,
        foreign=not never_writes(network),
        predictors={} if name is None else zoo.Bundled(name),
    )


def _label_dim(given: Any, own: int) -> int:
    if given is None:
        return own
    if not isinstance(given, Integral) or isinstance(given, bool) or given < 0:
        raise ConfigError(f"label_dim must be the number of classes, 0 for none, got {given!r}")
    if given and own and given != own:
        raise ConfigError(f"the model has {own} classes, got label_dim={given}; leave it out")
    return int(given)


def _label_kind(network: Any, count: int) -> str:
    """What the network says of its labels. One that has a single label, and says of no class either, is told a number: one
    class is no choice."""
    own = said(network, "label_kind")
    if own not in (None, *KINDS):
        raise ConfigError(f"the model's label_kind must be one of {', '.join(KINDS)}, got {own!r}")
    number = count == 1 and said(network, "can_guide") is None
    return own or ("vector" if number else "rows")


def _sigma(name: str, given: Any, own: Any) -> float:
    told, whose = (own, f"the model's {name}") if given is None else (given, name)
    level = told.item() if isinstance(told, Tensor) and told.numel() == 1 else told
    if not isinstance(level, Real) or isinstance(level, bool) or not float(level) >= 0:
        instead = f"; pass {name}= to the Sampler" if given is None else ""
        raise ConfigError(f"{whose} must be a noise level, a number that is not negative, got {told!r}{instead}")
    return float(level)


def _sample_shape(given: Any, own: tuple[int, ...] | None, axis: int) -> tuple[int, ...] | None:
    if given is None:
        return own
    if not isinstance(given, Sequence) or not all(isinstance(n, int) and n > 0 for n in given):
        raise ConfigError(f"shape must be that of one sample, e.g. (3, 64, 64), got {given!r}")
    if own is not None and len(given) != len(own):
        raise ConfigError(f"the model's samples are {own}, got shape={tuple(given)}; samples must have its rank")
    if own is not None and given[axis] != own[axis]:
        raise ConfigError(
            f"the model takes {own[axis]} channels, got shape={tuple(given)}; samples must have its channels"
        )
    return tuple(given)


def _image_shape(network: Any) -> tuple[int, ...] | None:
    if (shape := said(network, "sample_shape")) is not None:
        return tuple(shape)
    channels, size = said(network, "img_channels"), said(network, "img_resolution")
    return None if channels is None or size is None else (int(channels), int(size), int(size))


def opened(model: Any, weights: str | os.PathLike | None = None) -> Any:
    """The network of a name or a path, as it is; anything else is returned. Raises ConfigError or FileFormatError."""
    if isinstance(model, str) and model in (*zoo.names(), *zoo.published()):
        return zoo.load(model, weights)
    if weights is not None:
        got = repr(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__
        raise ConfigError(
            f"weights are for a published model's name ({', '.join(zoo.published())}), got the model {got}; leave them out"
        )
    if isinstance(model, torch.export.ExportedProgram):
        return checked(model)
    if not isinstance(model, (str, os.PathLike)):
        return model
    path = Path(model)
    if not path.exists():
        raise ConfigError(
            f"unknown model {str(model)!r}: no such file, and bundled models are: {', '.join(zoo.names()) or 'none'}; "
            f"published ones: {', '.join(zoo.published())}"
        )
    check_source(path)
    return _read(path)


def _read(path: Path) -> Any:
    """The model in a file or directory. Raises ConfigError or FileFormatError."""
    if path.is_dir():
        return load_adapter(path) if is_adapter(path) else load_model(path)
    if path.suffix == ".safetensors":
        return load_model(path)
    if path.suffix == ".onnx":
        return load_onnx(path)
    if path.suffix == ".pt2" and is_package(path):
        return load_compiled(path)
    check_no_loop(extra_names(path), path)
    if path.suffix == ".pt2":
        check_seal(path)
    try:
        found = load_program(path, verify=False) if path.suffix == ".pt2" else torch.jit.load(path, map_location="cpu")
    except Exception as error:  # torch raises what its archive readers happen to raise
        kind = "ExportedProgram" if path.suffix == ".pt2" else "TorchScript"
        why = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ConfigError(
            f"{path} is no {kind} file ({why}); known forms: TorchScript (.pt), ExportedProgram or AOTInductor package (.pt2), "
            f"ONNX (.onnx), this package's .safetensors or directory; a published one: `amed convert {path}` first; a state "
            "dict of your own: load it into its network and pass that"
        ) from error
    return checked(found) if isinstance(found, torch.export.ExportedProgram) else found


def checked(program: torch.export.ExportedProgram) -> nn.Module:
    """The program's module, which checks its inputs first and knows the shape of its samples and its classes."""
    module, signature = program.module(), Signature.of_program(program)

    def check(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = _as_taken(inputs, signature)
        signature.check(inputs, strides=False)
        return inputs

    module.register_forward_pre_hook(check, prepend=True)
    module.sample_shape = signature.sample_shape  # type: ignore[assignment]
    module.batch_range = signature.batch  # type: ignore[assignment]
    if signature.label_dim:
        module.label_dim = signature.label_dim  # type: ignore[assignment]
    if signature.takes_integers and not kept(module):
        module.label_kind = "index"  # type: ignore[assignment]
        module.can_guide = False  # type: ignore[assignment]  (which integer is no class is not known)
    return module


def _as_taken(inputs: tuple[Any, ...], signature: Signature) -> tuple[Any, ...]:
    """The inputs, rows of labels as integers (B,) where the program takes these: for no class one more than there are; or as a
    number each."""
    if len(inputs) != 3 or signature.inputs[2].shape or inputs[2].dim() != 2:
        return inputs
    x, sigma, rows = inputs
    if signature.takes_integers:
        return x, sigma, class_index(rows, rows.shape[1]).to(getattr(torch, signature.inputs[2].dtype))
    return x, sigma, rows[:, 0] if rows.shape[1] == 1 else rows
