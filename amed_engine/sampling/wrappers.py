"""Modules that hand their calls on: to which child, and whether that is all they do.

Known by the names that torch, peft and Lightning give, of which nothing is imported, or by what their own code says.
"""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any

import torch
from torch import nn

# Wrappers that compute nothing, by package and class, and the child that they call.
KNOWN = {
    ("torch", "OptimizedModule"): "_orig_mod",
    ("torch", "DataParallel"): "module",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch", "CheckpointWrapper"): "_checkpoint_wrapped_module",
    ("torch", "OffloadWrapper"): "_checkpoint_wrapped_module",
    ("torch", "AveragedModel"): "module",
    ("peft", "PeftModel"): "base_model",
    ("peft", "PeftMixedModel"): "base_model",
    ("lightning", "_FabricModule"): "_forward_module",
    ("lightning_fabric", "_FabricModule"): "_forward_module",
    ("amed_engine", "Bound"): "module",
}
COMPILED = (torch.jit.ScriptModule, torch.fx.GraphModule)
# A call that hands on all it is given, and nothing else: compared with a wrapper's own, as the same Python compiled both.
PLAIN: tuple[CodeType, ...] = (
    (lambda self, *inputs, **keywords: self.child(*inputs, **keywords)).__code__,
    (lambda self, *inputs, **keywords: self.child.forward(*inputs, **keywords)).__code__,
)


def passed_on(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The child, by name, that a wrapper hands every call on to; None for a module that computes something itself.

    A wrapper is one that `computes_nothing`, or a module of one child that takes anything at all and may compute something.
    """
    if isinstance(module, COMPILED):
        return None
    name = _told_child(type(module))
    if name is None and (only := only_child(module)) is not None:
        name = only if takes_anything(type(module)) else None
    child = None if name is None else module._modules.get(name)
    return None if name is None or child is None else (name, child)


def computes_nothing(module: nn.Module) -> bool:
    """Whether a wrapper's answer is its child's: it is a known one, or its code says so. Lightning's may round it."""
    if isinstance(module, COMPILED):
        return False
    strategy = vars(module).get("_strategy")
    rounding = getattr(getattr(strategy, "precision", None), "precision", "32-true")
    known = _told_child(type(module))
    return known in module._modules and rounding in ("32-true", "64-true")


def only_child(module: nn.Module) -> str | None:
    """The first name of the one module inside, None where there are several."""
    names = {id(child): name for name, child in reversed(module._modules.items()) if child is not None}
    return next(iter(names.values())) if len(names) == 1 else None


def takes_anything(kind: type[nn.Module]) -> bool:
    """Whether a call takes inputs and keywords of any number, and no others."""
    kinds = _parameter_kinds(kind)
    return bool(kinds) and all(
        each in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for each in kinds
    )


def takes_more(module: nn.Module) -> bool:
    """Whether a call takes inputs that its signature does not name, labels perhaps."""
    return not isinstance(module, COMPILED) and inspect.Parameter.VAR_POSITIONAL in _parameter_kinds(type(module))


def _parameter_kinds(kind: type[nn.Module]) -> list[Any]:
    function = kind.__call__ if kind.forward is nn.Module.forward else kind.forward
    if function is nn.Module.__call__:  # a list or dictionary of modules has none
        return []
    try:
        return [parameter.kind for parameter in inspect.signature(function).parameters.values()][1:]
    except (TypeError, ValueError):  # not a function of Python
        return []


def _told_child(kind: type[nn.Module]) -> str | None:
    """The child that a class is known for handing its calls on to, or that its code says."""
    return _known_child(kind) or _plain_child(kind)


def _known_child(kind: type[nn.Module]) -> str | None:
    """By the class that defines what a call does: a subclass with a call of its own is another wrapper."""
    name = "forward" if kind.__call__ is nn.Module.__call__ else "__call__"
    owner = next((ancestor for ancestor in kind.__mro__ if name in vars(ancestor)), kind)
    return KNOWN.get((owner.__module__.partition(".")[0], owner.__name__))


def _plain_child(kind: type[nn.Module]) -> str | None:
    """The attribute whose answer is returned as it is, where that is all the code of a call."""
    function = kind.forward if kind.__call__ is nn.Module.__call__ else kind.__call__
    # no_grad and its like, as decorators, change no answer; autocast, which does, is another module's.
    while getattr(function, "__globals__", {}).get("__name__") == "torch.utils._contextlib":
        function = getattr(function, "__wrapped__", None)
    code = getattr(function, "__code__", None)
    return code.co_names[0] if code is not None and any(_same(code, plain) for plain in PLAIN) else None


def _same(code: CodeType, plain: CodeType) -> bool:
    flags = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    return (
        (code.co_code, code.co_names[1:], code.co_argcount) == (plain.co_code, plain.co_names[1:], plain.co_argcount)
        and code.co_flags & flags == flags
        and code.co_kwonlyargcount == 0
    )
