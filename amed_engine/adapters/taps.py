"""The bottleneck of a network that does not return it: read from a submodule, or asked of a function.

A hook fires while torch.jit.trace, torch.compile or torch.export look at the network, never afterwards. So the adapter takes
what the hook caught and *returns* it: what is traced, compiled or exported is the adapter, and the bottleneck is its output.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import OWN_FEATURES, Denoised, Denoiser, as_denoised, copied, is_tracing
from amed_engine.sampling.modules import bare, layers

# torch numbers its hooks without a lock: two threads could be given the same place.
_HOOKING = threading.RLock()
# Hooks without a reader, to be removed when no compiler looks at the modules.
_LEFT: list[Tap] = []

Bottleneck = str | nn.Module | Callable[[], Tensor | None]


class Tap:
    """A forward hook that keeps a copy of a submodule's output until `take`, while somebody listens in this thread.

    bottleneck: what the block reads. The dotted name of a submodule of `root`, or a module: its latest output (B, C, h, w);
    a function without arguments: the features of the latest evaluation that it returns; None: nothing. Threads do not see
    each other's. A copy: layers that follow may write to the submodule's output.
    """

    def __init__(self, root: Any = None, bottleneck: Bottleneck | None = None):
        self.source = _find(root, bottleneck) if isinstance(bottleneck, str) else bottleneck
        if self.source is not None and not callable(self.source):
            raise ConfigError(
                f"bottleneck must be a module's name, a module or a function, got {type(bottleneck).__name__}"
            )
        self._handle: Any = None
        self._reader: Any = None
        self._local = threading.local()
        self._traced: Any = None  # while torch.compile looks, which knows no thread-local storage

    def attach(self, module: nn.Module, reader: object) -> Tap:
        """Hook the module for as long as the reader lives."""
        if _LEFT:
            _remove_left()
        # Not kept: a module that holds its hook and is held by it would outlive its last user.
        with _HOOKING:
            self._handle = module.register_forward_hook(self)
        self._reader = weakref.ref(reader)
        weakref.finalize(reader, self.detach).atexit = False
        return self

    @property
    def dead(self) -> bool:
        """Whether nobody reads it: a copy, made with the module that it is a hook of."""
        return self._reader is None or self._reader() is None

    def detach(self) -> None:
        if self._handle is not None:
            _LEFT.append(self)
            _remove_left()

    def __enter__(self) -> Tap:
        return self.attach(self.source, self) if isinstance(self.source, nn.Module) else self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def listen(self) -> None:
        """From now until `take`."""
        if not torch.compiler.is_compiling():
            if _LEFT:
                _remove_left()
            self._local.listens = True

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        if torch.compiler.is_compiling():
            self._traced = copied(output)
        elif getattr(self._local, "listens", False):
            self._local.value = copied(output)

    def take(self) -> Any:
        if torch.compiler.is_compiling():
            value, self._traced = self._traced, None
        else:
            value, self._local.value = getattr(self._local, "value", None), None
            self._local.listens = False
        return value

    def __reduce__(self):
        # A copy of the reader attaches its own.
        return Tap, ()

    def denoiser(self, model: Callable[[Tensor, Tensor], Any]) -> Denoiser:
        """The model as a denoiser whose features are what the block reads."""
        if self.source is None:
            return lambda x, sigma: as_denoised(model(x, sigma))

        def denoise(x: Tensor, sigma: Tensor) -> Denoised:
            self.listen()
            try:
                x0 = as_denoised(model(x, sigma)).x0
            finally:
                features = self.take()
            return Denoised(x0, self._checked(features, x))

        return denoise

    def _checked(self, caught: Any, x: Tensor) -> Tensor:
        features = caught if isinstance(self.source, nn.Module) else copied(self.source())  # type: ignore[misc]
        if features is None:
            raise ConfigError(
                "the bottleneck was not read in this evaluation; hooks see no call inside a compiled, traced or exported "
                "model: pass the plain module, or a function that returns the features"
            )
        if features.shape[0] != x.shape[0]:
            raise ConfigError(
                f"the bottleneck holds {features.shape[0]} rows for {x.shape[0]} samples, as under batched guidance; pass a "
                "function that returns the conditional rows"
            )
        read = None if features.dim() == 4 else readable(features, x, folded=False)
        return features if read is None else read


def _remove_left() -> None:
    """Remove the hooks that nobody reads: now, or the next time that no compiler looks."""
    with _HOOKING, _no_compiler() as free:
        while free and _LEFT:
            _LEFT.pop()._handle.remove()


@contextmanager
def _no_compiler() -> Iterator[bool]:
    """Keep torch.compile from beginning for the time of the block, in which it is told whether none is at work.

    It counts the hooks of a module and looks the last of them up by number later: the collector must remove none between.
    """
    lock = getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", None)
    if lock is None:  # nothing was compiled yet
        yield True
        return
    held = lock.acquire(blocking=False)
    try:
        yield held and import_module("torch._guards").CompileContext.try_get() is None
    finally:
        if held:
            lock.release()


def _find(root: Any, name: str) -> nn.Module:
    try:
        inner = bare(root)
        return inner.get_submodule(name) if hasattr(inner, "get_submodule") else root.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(
            f"the model has no submodule {name!r} to read a bottleneck from ({error}); pass the module itself"
        ) from error


def attach(network: Any, name: str, reader: object) -> Tap:
    """A tap on the submodule of this dotted name, for as long as its reader lives.

    The network may be wrapped, the name is that in the network itself. Raises ConfigError with the names that come near.
    """
    compiled = any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in layers(network)
    )
    if isinstance(bare(network), torch.jit.ScriptModule) or compiled:
        raise ConfigError(
            f"bottleneck={name!r} cannot be read from a network that is already scripted or compiled: wrap the plain module, "
            "then trace or compile what wrap returns; or pass bottleneck=None, with which predictors read zeros"
        )
    network = bare(network)
    try:
        submodule = network.get_submodule(name)
    except AttributeError as error:
        modules = network.named_modules() if isinstance(network, nn.Module) else ()
        near = [own for own, _ in modules if own and own.count(".") <= name.count(".")]
        raise ConfigError(
            f"bottleneck={name!r} is no submodule of {type(network).__name__}; it has {', '.join(near[:20]) or 'none'}"
        ) from error
    for key, hook in list(submodule._forward_hooks.items()):
        if isinstance(hook, Tap) and hook.dead:
            del submodule._forward_hooks[key]
    return Tap().attach(submodule, reader)


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


def readable(caught: Any, x: Tensor, folded: bool) -> Tensor | None:
    """What a tap caught as the bottleneck (B, C, h, w) of samples x (B, ...), in x's dtype; None where it is none.

    Of samples (C, L) it is (B, C, l), one row of places, h = 1. Of volumes and videos (B, C, d, h, w) the mean over d; that
    over frames of (B·F, C, h, w) where the network is known to have them in the batch, those of a sample together (`folded`).
    """
    if not isinstance(caught, Tensor) or not caught.is_floating_point():
        return None
    value = caught.to(x.dtype)
    if folded and value.dim() == 4:
        value = value.unflatten(0, (x.shape[0], -1)).mean(1)
    elif value.dim() == x.dim() == 5:
        value = value.mean(2)
    elif value.dim() == x.dim() == 3:
        value = value[:, :, None]
    if value.dim() != 4:
        return None
    # What is traced or exported has a symbol for its batch, which a question may tie to one size: left out for images.
    sure = is_tracing() or (torch.compiler.is_compiling() and x.dim() == 4)
    return value if sure or value.shape[0] == x.shape[0] else None


def refusal(caught: Any, x: Tensor, name: str) -> ConfigError:
    """Why what the module of this name gave for samples x is not the bottleneck of them, and what to do."""
    got = tuple(caught.shape) if isinstance(caught, Tensor) else type(caught).__name__
    return ConfigError(
        f"the module {name!r} gave {got} as the bottleneck of {x.shape[0]} samples {tuple(x.shape[1:])}, expected a tensor "
        f"(B, C, h, w); name another module, or bottleneck=None for none{OWN_FEATURES}"
    )
