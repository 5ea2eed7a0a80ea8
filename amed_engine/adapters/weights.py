"""The weights that a network's answer is made of, by their plain names, from wherever they are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from amed_engine.sampling.modules import disk_group, is_lazy, placed, plain_name


class OnDisk(NamedTuple):
    """A tensor of a safetensors file."""

    file: str
    key: str

    def read(self) -> Tensor:
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.key)


def weights_of(module: nn.Module) -> dict[str, Tensor | OnDisk]:
    """Parameters, and what `_stored` finds in their place, as if no wrapper were round any module; a tied one once.

    One that nothing brings, or that may be tied or a copy, is left on "meta".
    """
    named: dict[str, Tensor | OnDisk] = {}
    seen: set[Any] = set()
    matrices: dict[Any, list[Tensor]] = defaultdict(list)
    for prefix, part, whole in placed(module):
        kept = _Kept(part)
        for name, tensor in (*part.named_parameters(recurse=whole, remove_duplicate=False), *_stored(part, whole)):
            value = kept.value(name, tensor)
            if (same := _identity(tensor, value)) in seen:
                continue
            seen.add(same)
            copied = value is not tensor and isinstance(value, Tensor) and _is_copy(value, matrices)
            named[prefix + plain_name(part, name)] = tensor if copied else value
    return named


def readable(weights: dict[str, Tensor | OnDisk]) -> bool:
    """Whether all weights have numbers, and which of them are tied is known."""
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    files = {value.file for value in weights.values() if isinstance(value, OnDisk)}
    return not any(each.device.type == "meta" or is_lazy(each) for each in tensors) and all(
        Path(file).is_file() for file in files
    )


def _identity(tensor: Tensor, value: Tensor | OnDisk) -> Any:
    """The same for a tied weight; on "meta" it is two parameters, of one memory where they are kept."""
    if value is tensor:
        return id(tensor)
    if isinstance(value, OnDisk):
        return value
    return (value.data_ptr() or id(value), value.shape, value.stride(), value.dtype)


def _is_copy(value: Tensor, matrices: dict[Any, list[Tensor]]) -> bool:
    """Whether a weight that is kept elsewhere has the numbers of another: files keep a tied one twice, and do not say so."""
    if value.dim() < 2 or value.is_meta or not value.numel():
        return False
    alike = matrices[value.shape, value.dtype, tuple(value.flatten()[:8].tolist())]
    copy = any(torch.equal(value, other) for other in alike) and bool((value != value.flatten()[0]).any())
    alike.append(value)
    return copy


class _Kept:
    """Where the weights of an offloaded network are between its calls."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._files = {
            id(tensor): OnDisk(group.safetensors_file_path, key)
            for group in map(disk_group, module.modules())
            if group is not None
            for tensor, key in group.tensor_to_key.items()
        }

    def value(self, name: str, tensor: Tensor) -> Tensor | OnDisk:
        """From a file of diffusers' group offloading, from where accelerate keeps it, else the tensor itself."""
        if tensor.device.type != "meta":
            return self._files.get(id(tensor), tensor)
        owner, _, own = name.rpartition(".")
        hook = getattr(self._module.get_submodule(owner), "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (kept := getattr(each, "weights_map", None)) is not None:
                return kept[own]
        return tensor


# ---- weights that are no parameters ----


def _stored(module: nn.Module, whole: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the layers that keep their weights in buffers or packed: quantised ones."""
    for name, layer in module.named_modules(remove_duplicate=False) if whole else ():
        if not layer._modules:
            for own, tensor in (*_stored_buffers(layer), *_packed(layer)):
                yield f"{name}.{own}".lstrip("."), tensor


def _stored_buffers(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """All buffers, scales too, of a layer with a matrix of 8 bits among them, or of integers in place of any parameter.

    Running statistics, tables of noise levels, masks and indices (int64) are none.
    """
    buffers = list(layer.named_buffers(recurse=False))
    bare = next(layer.parameters(recurse=False), None) is None
    return buffers if any(_is_storage(buffer, bare) for _, buffer in buffers) else []


def _is_storage(buffer: Tensor, bare: bool) -> bool:
    if is_lazy(buffer) or buffer.dim() < 2 or buffer.dtype == torch.bool:
        return False
    whole_numbers = not buffer.is_floating_point() and not buffer.is_complex()
    return buffer.dtype.itemsize == 1 or (bare and whole_numbers and buffer.dtype.itemsize < 8)


def _packed(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a layer without parameters adds to its state dict: torch.ao's quantised layers."""
    own = type(layer)._save_to_state_dict is not nn.Module._save_to_state_dict
    if not own or isinstance(layer, torch.jit.ScriptModule) or next(layer.parameters(recurse=False), None) is not None:
        return
    state: dict[str, Any] = {}
    layer._save_to_state_dict(state, "", False)
    for name in sorted(state.keys() - layer._buffers.keys()):
        leaves = (leaf for leaf in tree_leaves(state[name]) if isinstance(leaf, Tensor))
        yield from ((f"{name}.{k}", leaf) for k, leaf in enumerate(leaves))
