"""Networks whose weights come and go with their calls: offloaded, or stored otherwise than they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import is_cast, module_of, told_devices


def brings_weights(network: Any) -> bool:
    """Whether a network's weights come and go with its calls: offloaded, or stored in another dtype than they compute in."""
    module = module_of(network)
    if module is None:
        return False
    if any(True for _ in told_devices(module)) or is_cast(module):
        return True
    return any(tensor.device.type == "meta" for tensor in module.parameters())


def awaited(network: Any) -> list[nn.Module]:
    """The modules whose weights are on "meta", without a hook that says where it brings them."""
    module = module_of(network)
    if module is None or any(True for _ in told_devices(module)):
        return []
    return [part for part in module.modules() if _is_empty(part)]


def _is_empty(part: nn.Module) -> bool:
    return any(tensor.device.type == "meta" for tensor in part.parameters(recurse=False))


@contextmanager
def brought(parts: list[nn.Module]) -> Iterator[None]:
    """Raises ConfigError where one of `awaited` modules is called without its weights: some of torch's kernels would compute
    with whatever is in memory."""

    def check(part: nn.Module, inputs: Any) -> None:
        if _is_empty(part):
            raise ConfigError(
                f"the weights of {type(part).__name__} are on 'meta', which holds no numbers, and nothing has brought them by "
                "the time of its call; load them, or offload the model by hooks of accelerate or diffusers"
            )

    handles = [part.register_forward_pre_hook(check) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
