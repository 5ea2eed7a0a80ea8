"""The bottleneck of a network that does not return it: read from a submodule by name.

A hook fires while torch.jit.trace, torch.compile or torch.export look at the network, never afterwards. So the adapter takes
what the hook caught and *returns* it: what is traced, compiled or exported is the adapter, and the bottleneck is its output.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.errors import ConfigError


class Tap:
    """A forward hook that keeps a submodule's output until `take`. Threads do not see each other's."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._traced: Any = None  # while torch.compile looks, which knows no thread-local storage

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
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


def attach(network: nn.Module, name: str) -> Tap:
    """A tap on the submodule of this dotted name. Raises ConfigError with the names that come near."""
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
    tap = Tap()
    submodule.register_forward_hook(tap)
    return tap


def detach(network: nn.Module, name: str, tap: Tap | None) -> None:
    """Undo `attach`."""
    hooks = network.get_submodule(name)._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is tap]:
        del hooks[key]


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
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(value, Tensor) or value.dim() != 4:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"the module {name!r} gave {got} as the bottleneck, expected a tensor (B, C, h, w); name another module, or "
            "bottleneck=None for none"
        )
    return value
