"""A guard against what a capture forbids, without a GPU."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = (
    torch.tensor,
    torch.as_tensor,
    torch.Tensor.new_tensor,
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.__bool__,
)


class NoHost(TorchFunctionMode):
    """Refuses what copies numbers from the host (which waits for it, and cannot be captured) or reads a value."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        assert func not in HOST or all(t.device.type == "cpu" for t in tensors), f"{func.__name__}{args[1:]}"
        return func(*args, **(kwargs or {}))


# Operators whose answer, or whose size, the host has to wait for.
WAITING = {
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "argwhere",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "_assert_async", "repeat_interleave",
}  # fmt: skip
INDEXING = ("index", "index_put", "index_put_")  # by a mask: as `nonzero`
COPIES = ("_to_copy", "copy", "copy_")


class NoWait(TorchDispatchMode):
    """Refuses operators that the host waits for, and copies between the CPU and the device (here: meta) either way.

    Below whatever a library does in Python, autograd's own work included: what arrives here is what a GPU would be told.
    """

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, self.seen = func.overloadpacket.__name__, self.seen + 1
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in WAITING or (name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in inputs)):
            raise AssertionError(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        if "cpu" in devices or (name in COPIES and not {t.device.type for t in inputs} <= devices):
            raise AssertionError(f"{func} between {[t.device for t in inputs]} and {devices}")
        return result


@pytest.fixture
def no_host():
    """() -> a context in which the host neither gives numbers nor waits for them; gives the `NoWait` that watches."""

    @contextmanager
    def guard():
        with ExitStack() as stack:
            stack.enter_context(NoHost())
            yield stack.enter_context(NoWait())

    return guard
