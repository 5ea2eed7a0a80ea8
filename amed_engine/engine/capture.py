"""What capturing needs of a device, the switches that change what is captured, and where weights were at the time."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from amed_engine.errors import AmedError
from amed_engine.kernels import backends

# One capture in the process at a time, and no device-wide synchronization nor release of cached memory during it: the
# allocator refuses to empty its cache while any thread captures.
_CAPTURE = threading.RLock()


class StaleGraphError(AmedError, RuntimeError):
    """Weights were re-assigned or moved after capture; replaying would read memory that is no longer theirs."""


class Recording(Protocol):
    """A captured graph."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Device(Protocol):
    """What capture needs of CUDA; the tests have a double of it that needs none."""

    def capturing(self) -> bool:
        """Whether the caller is recording a graph of its own."""
        ...

    def side_stream(self, work: Callable[[], Any]) -> Any:
        """Run work on the capture stream, ordered after and before the caller's stream; its result."""
        ...

    def record(self, work: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        """Capture work; the graph and its output, which lies in the pool."""
        ...

    def begin_use(self) -> None:
        """Order the caller's stream after the last use of the static buffers."""
        ...

    def end_use(self) -> None: ...

    def reserved_bytes(self) -> int: ...

    def wait(self) -> None:
        """Until the device has nothing left to do with graphs and buffers that are about to go."""
        ...

    def drop(self, recordings: list[Recording]) -> None:
        """Reset graphs that nobody will replay again, and release the pool they shared."""
        ...


class CudaDevice:
    """`Device` on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()
            self.used = torch.cuda.Event()

    def capturing(self) -> bool:
        return capturing(self.device)

    def side_stream(self, work: Callable[[], Any]) -> Any:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                result = work()
            current.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device), _CAPTURE, _no_garbage_collection(), _own_workspaces():
            try:
                # thread_local: another thread's allocation must not invalidate this capture.
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    output = work()
            except torch.OutOfMemoryError:
                self._settle(graph)
                raise
            except RuntimeError as error:
                self._settle(graph)
                raise AmedError(
                    f"this model cannot be captured as a CUDA graph: {error}; use backend='eager'"
                ) from error
            finally:
                # A capture that fails to end leaves its own stream current.
                torch.cuda.set_stream(current)
        return graph, output

    def _settle(self, graph: torch.cuda.CUDAGraph) -> None:
        """Give back what a failed capture holds, its share of the pool first of all: whoever keeps the error keeps the graph.

        A capture that could not be ended is over for CUDA only. The allocator has to be told, or every later attempt to
        release memory would fail.
        """
        try:
            graph.pool()  # refuses where no capture was ended
        except RuntimeError:
            index = torch.empty(0, device=self.device).device.index
            with suppress(RuntimeError):  # it never began
                torch._C._cuda_endAllocateToPool(index, self.pool)
                torch._C._cuda_releasePool(index, self.pool)
        graph.reset()

    def begin_use(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.used)

    def end_use(self) -> None:
        self.used.record(torch.cuda.current_stream(self.device))

    def reserved_bytes(self) -> int:
        release_cached_memory()
        return torch.cuda.memory_reserved(self.device)

    def wait(self) -> None:
        with _CAPTURE:
            torch.cuda.synchronize(self.device)

    def drop(self, recordings: list[Recording]) -> None:
        with _CAPTURE:
            for recording in recordings:
                recording.reset()
            self.pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()


def capturing(device: torch.device) -> bool:
    """Whether the caller is recording a graph of its own on a CUDA device."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def release_cached_memory() -> None:
    """`torch.cuda.empty_cache`, after whatever another thread is capturing."""
    with _CAPTURE:
        torch.cuda.empty_cache()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collecting a dead CUDA object during a capture would invalidate it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Let a capture allocate the workspaces of matrix products in its own pool, and nobody else use them afterwards.

    torch keeps one for each thread and stream. One made before would be freed under the graph by whoever clears them, as
    torch.compile's own graphs do, and be shared with whatever else runs on one of the 32 streams that torch hands out in turns.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


def numerics(module: nn.Module | None) -> tuple[Any, ...]:
    """The global switches and modes that change which kernels a capture records."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.backends.fp32_precision,  # type: ignore[attr-defined]
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.fp32_precision,  # type: ignore[attr-defined]
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        module.training if module is not None else None,
        backends()["cuda"],
    )


class Addresses:
    """Where a module's parameters and buffers were when a graph was captured.

    In-place changes keep the address and are seen by replays; anything else is stale, a submodule put in another's place too.
    """

    def __init__(self, module: nn.Module | None):
        modules = [] if module is None else list(module.modules())
        tables = [table for m in modules for table in (m._parameters, m._buffers)]
        self.places = [(t, name, v.data_ptr()) for t in tables for name, v in t.items() if v is not None]
        # TorchScript's table of children is no dict, and cannot be changed.
        children = [m._modules for m in modules if isinstance(m._modules, dict)]
        self.children = [(t, name, child) for t in children for name, child in t.items()]

    def check(self) -> None:
        for table, name, child in self.children:
            if table.get(name) is not child:
                raise _stale(f"module {name!r} was replaced")
        for table, name, address in self.places:
            # Not .get(): TorchScript's tables have none.
            value = table[name] if name in table else None  # noqa: SIM401
            if value is None or value.data_ptr() != address:
                raise _stale(f"weight {name!r} was re-assigned or moved")


def _stale(what: str) -> StaleGraphError:
    return StaleGraphError(
        f"{what} after its graph was captured; call sampler.clear_graphs() and warmup() again, or change weights in place"
    )
