"""What is known of a caller's network without calling it: what it wraps, where it runs, in which dtype it computes.

Read from modules as they stand, by the names that torch, diffusers and accelerate give: nothing of them is imported.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from amed_engine.sampling.kept import kept
from amed_engine.sampling.wrappers import computes_nothing, only_child, passed_on

OWN = "amed_engine"
# Of a module: its __call__ has the name of what torch made it of.
CALLS = ("forward", "__call__", nn.Module.__call__.__name__)


def layers(network: Any) -> Iterator[Any]:
    """The network, what it passes its calls on to, and so on to the innermost; through functools.partial and forward."""
    yield network
    while (network := _within(network)) is not None:
        yield network


def _within(network: Any) -> Any:
    if isinstance(network, functools.partial):
        return None if network.args else network.func
    if isinstance(network, MethodType):
        owner = network.__self__
        return owner if isinstance(owner, nn.Module) and network.__name__ in CALLS else None
    found = passed_on(network) if isinstance(network, nn.Module) else None
    return None if found is None else found[1]


def bare(network: Any) -> Any:
    """The network itself, without the wrappers that pass its calls on."""
    *_, innermost = layers(network)
    return innermost


def unknown_wrapper(network: Any) -> tuple[nn.Module, str] | None:
    """A wrapper that may compute something, and what it calls its child; None without."""
    modules = (layer for layer in layers(network) if isinstance(layer, nn.Module))
    found = ((layer, passed_on(layer)) for layer in modules if not computes_nothing(layer))
    return next(((layer, child[0]) for layer, child in found if child is not None), None)


def placed(module: nn.Module, prefix: str = "", within: bool = False) -> Iterator[tuple[str, nn.Module, bool]]:
    """The modules that wrappers and this package's own lead to, by their dotted names as if no wrapper were there.

    A network of another's making is one of them as a whole (True), the others are without what they hold. within: the
    module is a part of this package's.
    """
    *wrappers, inner = layers(module)
    yield from ((prefix, wrapper, False) for wrapper in wrappers)
    whole = not _is_ours(inner) and not (within and type(inner).__module__ == nn.ModuleList.__module__)
    yield prefix, inner, whole
    for name, child in () if whole else inner._modules.items():
        if child is not None:
            yield from placed(child, f"{prefix}{name}.", True)


def bound(network: Any) -> set[str]:
    """The keywords that functools.partial has given already."""
    given = (functools.partial, Bound)
    return {name for layer in layers(network) if isinstance(layer, given) for name in layer.keywords}


def copied(value: Any) -> Any:
    """A tensor's copy, differentiable; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def lent(value: Any) -> Any:
    """What a partial keeps for every call, its tensors copied, in dictionaries and lists too; without any, as it is."""
    holds = any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
    return tree_map_only(Tensor, Tensor.clone, value) if holds else value


class Given(functools.partial):
    """functools.partial whose callable may write to what it is given."""

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        given = {name: lent(value) for name, value in self.keywords.items()}
        return self.func(*map(lent, self.args), *inputs, **given | keywords)


class Bound(nn.Module):
    """functools.partial of a module as a module, whose weights move, and are known, with what wraps it."""

    def __init__(self, module: nn.Module, keywords: dict[str, Any]):
        super().__init__()
        self.module, self.keywords = module, keywords

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        given = {name: lent(value) for name, value in self.keywords.items()}
        return self.module(*inputs, **given | keywords)


def as_module(network: Any) -> Any:
    """What calls a module and nothing else as a module: its own forward, functools.partial of it. Others as they are, but
    what a partial gives them is lent.
    """
    inner = None if isinstance(network, nn.Module) else _within(network)
    inner = None if inner is None else as_module(inner)
    partial = isinstance(network, functools.partial)
    if not isinstance(inner, nn.Module):
        return Given(network.func, *network.args, **network.keywords) if partial else network
    return Bound(inner, dict(network.keywords)) if partial else inner


def said(network: Any, name: str, default: Any = None) -> Any:
    """An attribute of the network, the outermost wrapper's that has it; a traced or exported one may have kept it."""
    values = (getattr(layer, name, None) for layer in layers(network))
    told = next((value for value in values if value is not None), None)
    return kept(bare(network)).get(name, default) if told is None else told


def module_of(network: Any) -> nn.Module | None:
    """The module whose weights a callable uses: itself, or that of a partial or a bound method."""
    if isinstance(network, functools.partial):
        return module_of(network.func)
    if isinstance(network, MethodType):
        return module_of(network.__self__)
    return network if isinstance(network, nn.Module) else None


def plain_name(root: nn.Module, name: str) -> str:
    """The dotted name of a parameter or buffer of `root` as if no wrapper were round any of its modules."""
    parts, module = [], root
    for part in name.split("."):
        found = passed_on(module)
        if found is None or found[0] != part or only_child(module) is None:
            parts.append(part)
        child = getattr(module, part, None)
        module = child if isinstance(child, nn.Module) else module
    return ".".join(parts)


@contextmanager
def gathered(network: Any) -> Iterator[None]:
    """The parameters of FSDP in one piece, for the time of the block."""
    with ExitStack() as stack:
        for part in getattr(module_of(network), "modules", tuple)():
            if hasattr(part, "_fsdp_wrapped_module"):
                stack.enter_context(type(part).summon_full_params(part, recurse=False, writeback=False))
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or all of one that FSDP has cut into pieces."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def never_writes(network: Any) -> bool:
    """Whether a network leaves what it is given as it is and answers in new memory: a U-Net of this package's own does.

    Unless it has hooks, or a forward, that are not its own, or is compiled in place.
    """
    if isinstance(network, nn.Module) and _is_altered(network):
        return False
    if getattr(type(network), "lends_copies", False):
        return True
    modules = list(network.modules()) if isinstance(network, nn.Module) and _is_ours(network) else []
    known = (_is_ours(module) or type(module).__module__.startswith("torch.nn.") for module in modules)
    return bool(modules) and all(known) and not any(map(_is_altered, modules))


def _is_altered(module: nn.Module) -> bool:
    """Whether a call of this module itself runs more, or other code, than its class says."""
    if "forward" in vars(module) or getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return not all(map(_is_ours, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))


def _is_ours(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == OWN


# ---- where it runs ----


def device_of(network: Any) -> torch.device:
    """Where a network wants its inputs: where the hooks that bring its weights run it, else where its weights are.

    The CPU for one that has none, or none but on "meta" without a word on where they are brought.
    """
    module = module_of(network)
    if module is None:
        own = getattr(network, "device", None)
        return own if isinstance(own, torch.device) else torch.device("cpu")
    told = next(told_devices(module), None)
    if told is not None:
        return told
    devices = (tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors)
    own = getattr(module, "device", None)
    known = own if isinstance(own, torch.device) and own.type != "meta" else torch.device("cpu")
    return next((device for device in devices if device.type != "meta"), known)


def told_devices(module: nn.Module) -> Iterator[torch.device]:
    """Those that hooks of accelerate, and of diffusers' group offloading, run the modules on."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (device := getattr(each, "execution_device", None)) is not None:
                yield _device(device)
        group = getattr(_diffusers_hook(part, "group_offloading"), "config", None)
        if group is not None:
            yield _device(group.onload_device)


def _device(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _diffusers_hook(module: nn.Module, name: str) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def disk_group(part: nn.Module) -> Any:
    """The group of diffusers' offloading whose weights are in a file between calls, while its parameters hold nothing."""
    group = getattr(_diffusers_hook(part, "group_offloading"), "group", None)
    return group if getattr(group, "_is_offloaded_to_disk", False) else None


# ---- what it computes in ----


def is_cast(module: nn.Module) -> bool:
    """Whether diffusers' layerwise casting brings weights of it to another dtype for the time of a call."""
    return any(_cast_to(part) is not None for part in module.modules())


def _cast_to(part: nn.Module) -> torch.dtype | None:
    """The dtype that one layer's own weights are brought to."""
    hook = _diffusers_hook(part, "layerwise_casting")
    return None if hook is None else hook.compute_dtype


def dtypes_of(network: Any) -> list[torch.dtype]:
    """The dtypes its layers compute in, that of most numbers first: floating ones of 16 bits and more.

    Whole numbers and 8-bit floats are storage, which the layers themselves widen by scales, in buffers where not in
    parameters. Empty where nothing tells.
    """
    module = module_of(network)
    if module is None:
        return []
    parts = list(module.modules())
    counts = _counted((each, _cast_to(part)) for part in parts for each in part.parameters(recurse=False))
    if not counts and next(module.parameters(), None) is not None:
        foreign = (part for part in parts if not _is_ours(part))
        counts = _counted((buffer, None) for part in foreign for buffer in part.buffers(recurse=False))
    return [dtype for dtype, _ in counts.most_common()]


def _counted(tensors: Iterable[tuple[Any, torch.dtype | None]]) -> Counter[torch.dtype]:
    """Numbers by dtype; of each tensor with the dtype that it is brought to, None for its own."""
    counts: Counter[torch.dtype] = Counter()
    for tensor, cast in tensors:
        if not isinstance(tensor, Tensor) or is_lazy(tensor):
            continue
        dtype = cast or tensor.dtype
        if dtype.is_floating_point and torch.finfo(dtype).bits >= 16:
            counts[dtype] += max(tensor.numel(), 1)
    return counts


def is_lazy(tensor: Tensor) -> bool:
    """Whether a parameter or buffer has no numbers before the first call."""
    return nn.parameter.is_lazy(tensor)


def dtype_of(network: Any) -> torch.dtype | None:
    """The dtype of most of its numbers, see `dtypes_of`; None where nothing tells."""
    return next(iter(dtypes_of(network)), None)
