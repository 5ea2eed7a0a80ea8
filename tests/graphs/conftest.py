"""A double of CUDA's capture, and a guard against what a capture forbids: neither needs a GPU."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording:
    """Recomputes into the same memory, as a replayed graph does."""

    def __init__(self, work, output):
        self.work, self.output, self.alive = work, output, True

    def replay(self):
        assert self.alive, "replayed after reset"
        with torch.no_grad():
            self.output.copy_(self.work())

    def reset(self):
        self.alive = False


class Double:
    """`amed_engine.capture.Device` without a GPU. Recording runs nothing the caller can see, as under capture."""

    def __init__(self):
        self.log, self.recordings, self.outer, self.fail_at, self.broken = [], [], False, None, False

    def capturing(self):
        return self.outer

    def side_stream(self, work):
        result = work()
        self.log.append(("warm", len(result)))
        return result

    def record(self, work):
        if self.fail_at == len(self.recordings):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        output = torch.full_like(work(), float("nan"))
        recording = Recording((lambda: torch.zeros_like(output)) if self.broken else work, output)
        self.recordings.append(recording)
        self.log.append(("record", len(output)))
        return recording, output

    def begin_use(self):
        self.log.append(("begin", None))

    def end_use(self):
        self.log.append(("end", None))

    def reserved_bytes(self):
        return 100 * len(self.recordings)

    def drop(self, recordings):
        for recording in recordings:
            recording.reset()
        self.log.append(("drop", None))


@pytest.fixture
def double():
    return Double()


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
