"""In which of torch's modes a block runs, whatever the caller's are: gradients, training, the defaults of new tensors."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import module_of

P = ParamSpec("P")
R = TypeVar("R")

# The default dtype is the whole process's: one thread at a time sets it, and puts it back.
_BUILDING = threading.RLock()


@contextmanager
def plain_defaults() -> Iterator[None]:
    """On the CPU in float32, as torch starts, for modules of this package that are built in the block."""
    with _BUILDING, torch.device("cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Out of a caller's autocast, if in it: it is for networks, and predictors' few numbers are not to be rounded."""
    known = device.type != "meta"  # which autocast does not know
    inside = known and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if inside else nullcontext()


@contextmanager
def modes_kept(module: nn.Module | None) -> Iterator[None]:
    """A module in evaluation mode for a while; every part of it is left in the mode that it was found in."""
    parts = () if module is None else module.modules()
    modes = [(part, part.training) for part in parts if hasattr(part, "training")]  # frozen TorchScript has none
    if module is not None:
        with suppress(NotImplementedError):  # exported programs have no modes
            module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def evaluating(module: nn.Module | None) -> AbstractContextManager[None]:
    """`modes_kept` for a module that was in evaluation mode, and may be in training since."""
    trains = module is not None and any(getattr(part, "training", False) for part in module.modules())
    return modes_kept(module) if trains else nullcontext()


def leaving_modes(work: Callable[P, R]) -> Callable[P, R]:
    """For functions of a model, their first argument: where it is a module, all of it is left in the modes it came in."""

    @functools.wraps(work)
    def with_model(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        with modes_kept(module_of(model)):
            return work(*args, **kwargs)

    return with_model


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Out of torch.inference_mode, if in it: autograd refuses the tensors that are made there, for good."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield


@contextmanager
def differentiable(what: str) -> Iterator[None]:
    """With gradients, under torch.inference_mode too. Raises ConfigError where `what` can have none, see `_NO_GRADIENT`."""
    with plain_tensors(), torch.enable_grad():
        try:
            yield
        except RuntimeError as error:
            why = next((why for sign, why in _NO_GRADIENT.items() if sign in str(error)), None)
            if why is None:
                raise
            raise ConfigError(f"{what} {why} ({str(error).partition('.')[0]})") from error


_NO_GRADIENT = {
    "nference tensor": "holds tensors that were made under torch.inference_mode, and no gradient goes through those: make or "
    "load it outside",
    "modified by an inplace operation": "writes to tensors that its own gradients need: write to copies of them in it, or use "
    "what needs no gradients, amed_engine.fit",
    "does not require grad": "gives an answer that no gradient comes from: it runs under torch.no_grad, detaches it or leaves "
    "torch",
    "backward through the graph a second time": "keeps tensors from one call to the next, its former answers with them: detach "
    "them in it, or use what needs no gradients, amed_engine.fit",
}
