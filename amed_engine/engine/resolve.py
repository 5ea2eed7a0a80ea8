"""From whatever a caller has (a name, a file, a module, a program) to one callable and what is known of it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine import zoo
from amed_engine.adapters import Signature, is_package, load_onnx, load_package
from amed_engine.checkpoints import load_model, load_program
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, as_denoised


@dataclass(frozen=True)
class Model:
    """A network and its facts. `network` is (x, sigma[, labels (B, label_dim)]) -> D or (D, features)."""

    network: Callable[..., Any]
    shape: tuple[int, ...] | None  # (C, H, W)
    label_dim: int
    sigma_min: float
    sigma_max: float
    name: str | None = None  # in the zoo
    autocast: torch.dtype | None = None  # of the network's arithmetic
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def module(self) -> nn.Module | None:
        return self.network if isinstance(self.network, nn.Module) else None

    @property
    def _parameter(self) -> nn.Parameter | None:
        # "is not None": some modules have a length, and a compiled one raises when it is asked whether it is true.
        return next(self.module.parameters(), None) if self.module is not None else None

    @property
    def precision(self) -> str | None:
        """Name of the dtype its arithmetic is in, "float32" etc.; None where a callable does not tell."""
        parameter = self._parameter
        dtype = self.autocast or (None if parameter is None else parameter.dtype)
        return None if dtype is None else str(dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where its parameters are; without any, what a compiled model says, or the CPU."""
        parameter = self._parameter
        own = getattr(self.network, "device", None)
        known = own if isinstance(own, torch.device) else torch.device("cpu")
        return known if parameter is None else parameter.device

    def denoise(self, x: Tensor, sigma: Tensor, *labels: Tensor) -> Denoised:
        """The network's answer in x's precision. Networks get float32 unless their parameters are float64."""
        parameter = self._parameter
        dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32
        inputs = (x.contiguous(memory_format=self.memory_format), sigma, *labels)
        # The caller's own autocast has no say, and its cache of cast weights none in a graph, which would read them on
        # after they changed.
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            denoised = as_denoised(self._call(*(tensor.to(dtype) for tensor in inputs)))
        _check_answer(denoised.x0, x)
        return denoised._replace(x0=denoised.x0.to(x.dtype))

    def _call(self, *inputs: Tensor) -> Any:
        """The network's answer; its own errors say how it was called, which is the cause of most of them."""
        try:
            return self.network(*inputs)
        except (TypeError, RuntimeError) as error:
            names = ("x", "sigma", "labels")[: len(inputs)]
            given = ", ".join(f"{name} {_named(tensor)}" for name, tensor in zip(names, inputs, strict=True))
            error.add_note(f"the model was called with {given}; {_HOW_TO_WRAP}")
            raise


_HOW_TO_WRAP = (
    "a raw network becomes a denoiser by amed_engine.wrap(network, prediction=...); one with classes needs label_dim="
)


def _named(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _check_answer(x0: Tensor, x: Tensor) -> None:
    """D is an estimate of x without its noise. Looks at no values. Raises ConfigError."""
    if x0.shape != x.shape:
        raise ConfigError(
            f"the model returned shape {tuple(x0.shape)} for an input of {tuple(x.shape)}; a denoiser returns an estimate "
            "of the clean data in its input's shape"
        )
    if not x0.is_floating_point() or x0.device != x.device:
        raise ConfigError(
            f"the model returned {x0.dtype} on {x0.device} for an input on {x.device}; a denoiser returns an estimate of "
            "the clean data, in floating point and where its input is"
        )


def resolve(
    model: Any,
    *,
    shape: tuple[int, ...] | None = None,
    label_dim: int | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Model:
    """A Model from a zoo name, a path, an nn.Module (compiled and scripted ones too), an ExportedProgram or a callable.

    What is not given is read from the module's attributes, which EDM's networks have: img_channels, img_resolution,
    label_dim, sigma_min, sigma_max. Modules are put into evaluation mode. Raises ConfigError.
    """
    name = model if isinstance(model, str) and model in zoo.names() else None
    network = _open(model)
    if isinstance(network, type):
        raise ConfigError(
            f"model is the class {network.__name__}, not a model; pass an instance, {network.__name__}(...)"
        )
    if not callable(network):
        raise ConfigError(
            f"model must be a zoo name, a path, an nn.Module, an ExportedProgram or a callable, got {type(model).__name__}"
        )
    if isinstance(network, nn.Module):
        with contextlib.suppress(NotImplementedError):  # exported programs have no modes
            network.eval()
    if isinstance(check := getattr(network, "check_ready", None), MethodType):  # an adapter knows what it lacks
        check()
    own = _image_shape(network)
    if shape is not None and own is not None and _check_shape(shape)[0] != own[0]:
        raise ConfigError(
            f"the model takes {own[0]} channels, got shape={tuple(shape)}; samples must have its channels"
        )
    return Model(
        network=network,
        shape=_check_shape(shape) if shape is not None else own,
        label_dim=_label_dim(label_dim, int(getattr(network, "label_dim", 0) or 0)),
        sigma_min=_sigma("sigma_min", sigma_min, getattr(network, "sigma_min", 0.002)),
        sigma_max=_sigma("sigma_max", sigma_max, getattr(network, "sigma_max", math.inf)),
        name=name,
    )


def _label_dim(given: Any, own: int) -> int:
    if given is None:
        return own
    if not isinstance(given, Integral) or isinstance(given, bool) or given < 0:
        raise ConfigError(f"label_dim must be the number of classes, 0 for none, got {given!r}")
    if given and own and given != own:
        raise ConfigError(f"the model has {own} classes, got label_dim={given}; leave it out")
    return int(given)


def _sigma(name: str, given: Any, own: Any) -> float:
    if given is None:
        return float(own)
    level = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    if not isinstance(level, Real) or isinstance(level, bool) or not float(level) >= 0:
        raise ConfigError(f"{name} must be a noise level, a number that is not negative, got {given!r}")
    return float(level)


def _check_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ConfigError(f"shape must be that of one sample, e.g. (3, 64, 64), got {shape!r}")
    return tuple(shape)


def _image_shape(network: Any) -> tuple[int, ...] | None:
    if (shape := getattr(network, "sample_shape", None)) is not None:
        return tuple(shape)
    channels, size = getattr(network, "img_channels", None), getattr(network, "img_resolution", None)
    return None if channels is None or size is None else (int(channels), int(size), int(size))


def _open(model: Any) -> Any:
    if isinstance(model, torch.export.ExportedProgram):
        return checked(model)
    if not isinstance(model, (str, os.PathLike)):
        return model
    if isinstance(model, str) and model in (*zoo.names(), *zoo.published()):
        return zoo.load(model)
    path = Path(model)
    if not path.exists():
        raise ConfigError(
            f"unknown model {str(model)!r}: no such file, and bundled models are: {', '.join(zoo.names()) or 'none'}; "
            f"published ones: {', '.join(zoo.published())}"
        )
    return _read(path)


def _read(path: Path) -> Any:
    """The model in a file or directory. Raises ConfigError or FileFormatError."""
    if path.is_dir() or path.suffix == ".safetensors":
        return load_model(path)
    if path.suffix == ".onnx":
        return load_onnx(path)
    if path.suffix == ".pt2" and is_package(path):
        return load_package(path)
    try:
        opened = load_program(path) if path.suffix == ".pt2" else torch.jit.load(path, map_location="cpu")
    except Exception as error:  # torch raises what its archive readers happen to raise
        kind = "ExportedProgram" if path.suffix == ".pt2" else "TorchScript"
        why = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ConfigError(
            f"{path} is no {kind} file ({why}); known forms: TorchScript (.pt), ExportedProgram or AOTInductor package (.pt2), "
            f"ONNX (.onnx), this package's .safetensors or directory; a published one: `amed convert {path}` first; a state "
            "dict of your own: load it into its network and pass that"
        ) from error
    return checked(opened) if isinstance(opened, torch.export.ExportedProgram) else opened


def checked(program: torch.export.ExportedProgram) -> nn.Module:
    """The program's module, which checks its inputs first and knows the shape of its samples."""
    module, signature = program.module(), Signature.of_program(program)
    module.register_forward_pre_hook(lambda _, inputs: signature.check(inputs, strides=False), prepend=True)
    module.sample_shape = signature.sample_shape  # type: ignore[assignment]
    return module


def place(model: Model, device: torch.device | str | None) -> torch.device:
    """Move the model to a device, None leaves it; the device it is on then. Raises ConfigError."""
    if device is None:
        return torch.empty(0, device=model.device).device  # with its index, as below
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}; pass e.g. 'cpu' or 'cuda:0'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r} was asked for, but torch sees no CUDA device; pass device='cpu'")
    try:
        # As tensors there have it: with its index on a GPU, without one on the CPU.
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    if model.module is not None:
        model.module.to(device)
    return device


def tune(
    model: Model,
    *,
    compile: str | None,
    memory_format: torch.memory_format | None,
    autocast: torch.dtype | None,
) -> Model:
    """The model with its network compiled, in another memory format or under autocast; see `Sampler`."""
    _check_compile(model, compile)
    if autocast not in (None, torch.float16, torch.bfloat16):
        raise ConfigError(f"autocast must be torch.float16, torch.bfloat16 or None, got {autocast!r}")
    if memory_format not in (None, torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        raise ConfigError(
            f"memory_format must be torch.channels_last, another one of torch, or None, got {memory_format!r}"
        )
    if memory_format is not None and model.module is not None:
        model.module.to(memory_format=memory_format)  # type: ignore[call-overload]
    network = model.network if compile is None else torch.compile(model.network, mode=compile)
    return replace(model, network=network, autocast=autocast, memory_format=memory_format or torch.contiguous_format)


def _check_compile(model: Model, mode: Any) -> None:
    if mode in ("reduce-overhead", "max-autotune"):
        raise ConfigError(
            f"compile={mode!r} captures graphs of its own inside ours; use 'default' or 'max-autotune-no-cudagraphs'"
        )
    if mode not in (None, "default", "max-autotune-no-cudagraphs"):
        raise ConfigError(f"compile must be 'default', 'max-autotune-no-cudagraphs' or None, got {mode!r}")
    if mode is not None and isinstance(model.network, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise ConfigError(
            "torch.compile takes no TorchScript model; leave compile out, or pass the module it was made of"
        )
