"""The bottleneck of a network that does not return it: read from a submodule, or asked of a function.

A hook fires while torch.jit.trace, torch.compile or torch.export look at the network, never afterwards. So the adapter takes
what the hook caught and *returns* it: what is traced, compiled or exported is the adapter, and the bottleneck is its output.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, Denoiser, as_denoised

Bottleneck = str | nn.Module | Callable[[], Tensor | None]


class Tap:
    """A forward hook that keeps a submodule's output until `take`: once attached, or while the `with` block lasts.

    bottleneck: what the block reads. The dotted name of a submodule of `root`, or a module: its latest output (B, C, h, w);
    a function without arguments: the features of the latest evaluation that it returns; None: nothing. Threads do not see
    each other's.
    """

    def __init__(self, root: Any = None, bottleneck: Bottleneck | None = None):
        self.source = _find(root, bottleneck) if isinstance(bottleneck, str) else bottleneck
        if self.source is not None and not callable(self.source):
            raise ConfigError(
                f"bottleneck must be a module's name, a module or a function, got {type(bottleneck).__name__}"
            )
        self._handle: Any = None
        self._local = threading.local()
        self._traced: Any = None  # while torch.compile looks, which knows no thread-local storage

    def attach(self, module: nn.Module) -> Tap:
        # Not kept: a module that holds its hook and is held by it would outlive its last user.
        self._handle = module.register_forward_hook(self)
        return self

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def __enter__(self) -> Tap:
        return self.attach(self.source) if isinstance(self.source, nn.Module) else self

    def __exit__(self, *error: object) -> None:
        self.detach()
        self.take()

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        if torch.compiler.is_compiling():
            self._traced = output
        else:
            self._local.value = output

    def take(self) -> Any:
        if torch.compiler.is_compiling():
            value, self._traced = self._traced, None
        else:
            value, self._local.value = getattr(self._local, "value", None), None
        return value

    def __reduce__(self):
        # A copy of the module has its own.
        return Tap, ()

    def denoiser(self, model: Callable[[Tensor, Tensor], Any]) -> Denoiser:
        """The model as a denoiser whose features are what the block reads."""
        if self.source is None:
            return lambda x, sigma: as_denoised(model(x, sigma))

        def denoise(x: Tensor, sigma: Tensor) -> Denoised:
            self.take()
            x0 = as_denoised(model(x, sigma)).x0
            return Denoised(x0, self._read(x.shape[0]))

        return denoise

    def _read(self, batch: int) -> Tensor:
        features = self.take() if isinstance(self.source, nn.Module) else self.source()  # type: ignore[misc]
        if features is None:
            raise ConfigError(
                "the bottleneck was not read in this evaluation; hooks see no call inside a compiled, traced or exported "
                "model: pass the plain module, or a function that returns the features"
            )
        if features.shape[0] != batch:
            raise ConfigError(
                f"the bottleneck holds {features.shape[0]} rows for {batch} samples, as under batched guidance; pass a "
                "function that returns the conditional rows"
            )
        return features


def _find(root: Any, name: str) -> nn.Module:
    try:
        return root.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(
            f"the model has no submodule {name!r} to read a bottleneck from ({error}); pass the module itself"
        ) from error


def attach(network: nn.Module, name: str) -> Tap:
    """A tap for good on the submodule of this dotted name. Raises ConfigError with the names that come near."""
    if isinstance(network, torch.jit.ScriptModule) or hasattr(network, "_orig_mod"):
        raise ConfigError(
            f"bottleneck={name!r} cannot be read from a network that is already scripted or compiled: wrap the plain module, "
            "then trace or compile what wrap returns"
        )
    try:
        submodule = network.get_submodule(name)
    except AttributeError as error:
        near = [own for own, _ in network.named_modules() if own and own.count(".") <= name.count(".")]
        raise ConfigError(
            f"bottleneck={name!r} is no submodule of {type(network).__name__}; it has {', '.join(near[:20]) or 'none'}"
        ) from error
    return Tap().attach(submodule)


def find(network: Any) -> str | None:
    """The dotted name of the bottleneck of a U-Net of a known family, None where there is none.

    `middle_block` of guided-diffusion and its descendants, `mid_block` of diffusers, the last encoder block of EDM.
    """
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
        return None
    for name in ("middle_block", "mid_block"):
        if isinstance(getattr(network, name, None), nn.Module):
            return name
    for prefix, owner in (("", network), ("model.", getattr(network, "model", None))):
        encoder = getattr(owner, "enc", None)
        if isinstance(encoder, nn.ModuleDict) and len(encoder):
            return f"{prefix}enc.{list(encoder)[-1]}"
    return None


def check_features(value: Any, name: str) -> Tensor:
    """What a tap caught, as the bottleneck (B, C, h, w)."""
    if not isinstance(value, Tensor) or value.dim() != 4:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"the module {name!r} gave {got} as the bottleneck, expected a tensor (B, C, h, w); name another module, or "
            "bottleneck=None for none"
        )
    return value
