"""Whether a configuration fits the tensors of its file, asked without memory: it may claim any size, they have theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from amed_engine.errors import ConfigError
from amed_engine.solvers.arguments import told

CALLS = 24  # of torch that a constructor makes for a tensor of its own, at most; here 8, in diffusers 7
TABLES = 1 << 24  # numbers that a network may compute and no file holds, such as of positions
PLAIN: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,), type(None): ()}
Module = TypeVar("Module", bound=nn.Module)


def check_types(make: type[nn.Module], config: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first entry that is not of the plain type which the constructor declares; null passes."""
    for name, hint in get_type_hints(make.__init__).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        value = config.get(name)
        if value is None or not all(kind in PLAIN for kind in kinds):
            continue
        if type(value) not in (valid := [kind for each in kinds for kind in PLAIN[each]]):
            raise ConfigError(f"{name} must be {' or '.join(kind.__name__ for kind in valid)}, got {told(value)}")


def without_memory(make: Callable[[], Module], count: int) -> Module:
    """The module on the meta device. Raises ConfigError where it has more layers than `count` tensors can fill, and whatever
    its constructor raises."""
    # The first puts back what torch.no_grad in a constructor cannot: to leave that is a call of torch too, which is stopped.
    with torch.set_grad_enabled(torch.is_grad_enabled()), torch.device("meta"), _Layers(count):
        return make()


def check_numbers(module: nn.Module, shapes: Sequence[torch.Size]) -> None:
    """Raise ConfigError where a module of these tensors' names or others has more tensors, or numbers, than they are."""
    own = [tensor.numel() for tensor in module.state_dict().values()]
    held = sum(shape.numel() for shape in shapes)
    if len(own) > len(shapes) or sum(own) > held:
        raise ConfigError(
            f"it asks for {len(own)} tensors of {sum(own)} numbers, the file holds {len(shapes)} of {held}"
        )
    if (tables := sum(buffer.numel() for buffer in module.buffers())) > held + TABLES:
        raise ConfigError(f"it asks for tables of {tables} numbers, more than {held + TABLES}")


class _Layers(TorchFunctionMode):
    """Stops a constructor that makes more layers than a file's tensors can fill."""

    def __init__(self, count: int):
        super().__init__()
        self.count, self.left = count, CALLS * (count + 16)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise ConfigError(f"it asks for more layers than the {self.count} tensors of the file can fill")
        return func(*args, **(kwargs or {}))
