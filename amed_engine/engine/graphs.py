"""Whole-loop CUDA graphs: the five evaluations and everything between them replayed by one launch.

One pool, one capture stream and one lock for each cache. Inputs and outputs are static buffers outside the pool, so graphs
may share its memory: they never run at once and never read each other's results. All warm-ups come before the first
capture, the largest batch is captured first. Nothing is ever evicted alone (a later graph may hold an earlier one's
workspace): above `max_graphs` there is none for a batch, `clear` drops all of them together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from amed_engine.engine.capture import Addresses, Device, Recording, numerics
from amed_engine.errors import AmedError, ConfigError

WARMUPS = 3  # torch's own figure; TorchScript's profiling executor and fuser settle after six
WARMUPS_TORCHSCRIPT = 6

_COUNTING = threading.Lock()

# Latents (B, ...), then labels and what else the loop takes, each with B rows or None.
Inputs = tuple[Tensor | None, ...]
Loop = Callable[..., Tensor]  # (*inputs) -> images


class GraphKey(NamedTuple):
    """What must be equal for graphs to belong together; only the batch size differs under one key."""

    guidance_scale: float | None
    labels: tuple[torch.dtype, tuple[int, ...]] | None  # dtype and shape of one row
    latents: tuple[torch.dtype, tuple[int, ...]]
    flags: tuple[Any, ...]  # see `numerics`


@dataclass
class Stats:
    """What ran how often so far."""

    captures: int = 0
    replays: int = 0
    eager_runs: int = 0

    def count(self, what: Literal["captures", "replays", "eager_runs"]) -> None:
        """One more, from any thread."""
        with _COUNTING:
            setattr(self, what, getattr(self, what) + 1)


class Bucket(NamedTuple):
    """One line of a warm-up report."""

    batch: int
    seconds: float
    reserved_bytes: int
    bitwise: bool  # the first replay equals the eager result to the last bit


@dataclass(frozen=True)
class WarmupReport:
    """What capturing cost: a line per batch size, none where nothing is captured."""

    backend: str
    buckets: tuple[Bucket, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(bucket.seconds for bucket in self.buckets)


@dataclass
class Captured:
    """A key's graphs by batch size, and what they read: weights where they were, the loop with its constants."""

    graphs: dict[int, Graph]
    addresses: Addresses
    loop: Loop


@dataclass
class Graph:
    """One captured batch size: static inputs, the recording, its output."""

    recording: Recording
    inputs: Inputs
    output: Tensor

    def load(self, inputs: Inputs) -> None:
        """Copy a batch in; rows beyond it keep what they had, their results are not read."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine[: given.shape[0]].copy_(given)


def check_sizes(batch_sizes: Any) -> list[int]:
    """The batch sizes to capture, largest first. Raises ConfigError."""
    sizes = list(batch_sizes) if isinstance(batch_sizes, (Sequence, set)) else []
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ConfigError(f"batch_sizes must be positive integers, e.g. (1, 8, 64), got {batch_sizes!r}")
    return sorted(set(sizes), reverse=True)


@dataclass
class GraphCache:
    """Graphs of one Sampler by key and batch size."""

    device: Device
    batch_sizes: Sequence[int]
    module: nn.Module | None
    warmups: int = 0  # as many as the module needs
    max_graphs: int = 16
    insist: bool = False  # try again after running out of memory
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self):
        self.batch_sizes = check_sizes(self.batch_sizes)
        scripted = isinstance(self.module, torch.jit.ScriptModule)
        self.warmups = self.warmups or (WARMUPS_TORCHSCRIPT if scripted else WARMUPS)
        self._captured: dict[GraphKey, Captured] = {}
        self._refused: set[GraphKey] = set()  # ran out of memory; not tried again until `clear`
        self._lock = threading.RLock()

    def run(self, key: GraphKey, loop: Loop, *inputs: Tensor | None) -> Tensor | None:
        """The loop's images of a batch, padded to a captured size or split above the largest; None without a graph.

        Graphs that are missing are captured first, unless that is not allowed or failed before: see `warmup`.
        """
        with self._lock:
            if self.device.capturing():
                return None
            self.warmup(key, loop, *inputs)
            captured = self._captured.get(key)
            return None if captured is None else self._replay_all(captured, inputs)

    def warmup(self, key: GraphKey, loop: Loop, *inputs: Tensor | None) -> WarmupReport:
        """Capture every batch size of a key now, from example rows of the inputs.

        Raises torch.OutOfMemoryError, after which the key has no graphs until `clear`.
        """
        with self._lock:
            if key in self._captured:
                return WarmupReport("graph")
            taken = sum(len(captured.graphs) for captured in self._captured.values())
            full = taken + len(self.batch_sizes) > self.max_graphs
            if full or key in self._refused or self.device.capturing():
                return WarmupReport("eager")
            return WarmupReport("graph", self._capture_all(key, loop, inputs))

    def clear(self) -> None:
        """Drop every graph and the memory they share."""
        with self._lock:
            recordings = [g.recording for captured in self._captured.values() for g in captured.graphs.values()]
            # Our own references go first, and the static buffers with them: not while another stream still reads those.
            self.device.wait()
            self._captured.clear()
            self._refused.clear()
            self.device.drop(recordings)

    def _replay_all(self, captured: Captured, inputs: Inputs) -> Tensor:
        captured.addresses.check()
        self.device.begin_use()
        try:
            images = [self._replay(captured.graphs, part) for part in self._parts(inputs)]
        finally:
            self.device.end_use()
        return images[0] if len(images) == 1 else torch.cat(images)

    def _parts(self, inputs: Inputs) -> Iterator[Inputs]:
        largest = self.batch_sizes[0]
        for start in range(0, _count(inputs), largest):
            yield tuple(None if each is None else each[start : start + largest] for each in inputs)

    def _replay(self, graphs: dict[int, Graph], inputs: Inputs) -> Tensor:
        count = _count(inputs)
        graph = graphs[min(size for size in graphs if size >= count)]
        graph.load(inputs)
        graph.recording.replay()
        self.stats.count("replays")
        # A copy: the next replay writes over the graph's own output.
        return graph.output[:count].clone()

    def _capture_all(self, key: GraphKey, loop: Loop, example: Inputs) -> tuple[Bucket, ...]:
        inputs: dict[int, Inputs] = {
            size: tuple(None if each is None else _rows(each, size) for each in example) for size in self.batch_sizes
        }
        graphs: dict[int, Graph] = {}
        # A warm-up shares workspaces with replays that may still run on another stream.
        self.device.begin_use()
        try:
            expected = self._warm_up(loop, inputs)
            report = tuple(self._capture(loop, size, inputs[size], expected[size], graphs) for size in self.batch_sizes)
        except BaseException as error:
            if isinstance(error, torch.OutOfMemoryError) and not self.insist:
                self._refused.add(key)
            self._abandon(graphs)
            raise
        self._captured[key] = Captured(graphs, Addresses(self.module), loop)
        return report

    def _abandon(self, graphs: dict[int, Graph]) -> None:
        """Some of the sizes are worse than none. Their memory comes back once no other graph uses the pool."""
        recordings = [graph.recording for graph in graphs.values()]
        self.device.wait()
        graphs.clear()
        if self._captured:
            for recording in recordings:
                recording.reset()
        else:
            self.device.drop(recordings)

    def _warm_up(self, loop: Loop, inputs: dict[int, Inputs]) -> dict[int, Tensor]:
        """Run eagerly on the capture stream until nothing is compiled, tuned or allocated for the first time any more.

        All sizes in turns: what a later size makes torch.compile replace must have run for the earlier ones too.
        """
        results: dict[int, Tensor] = {}
        for _ in range(self.warmups):
            for size, arguments in inputs.items():
                results[size] = self.device.side_stream(lambda arguments=arguments: loop(*arguments))
        return results

    def _capture(self, loop: Loop, size: int, inputs: Inputs, expected: Tensor, graphs: dict[int, Graph]) -> Bucket:
        started, before = time.perf_counter(), self.device.reserved_bytes()
        recording, output = self.device.record(lambda: loop(*inputs))
        self.stats.count("captures")
        graphs[size] = Graph(recording, inputs, output)
        recording.replay()
        bitwise = torch.equal(output, expected)
        # An empty or stale graph is far off; kernels that add in any order are not.
        atol = 1e-2 * float(expected.nan_to_num().abs().max())
        if not bitwise and not torch.allclose(output, expected, rtol=1e-2, atol=atol, equal_nan=True):
            raise AmedError(
                f"the captured graph for batch {size} does not reproduce the eager result; use backend='eager'"
            )
        return Bucket(size, time.perf_counter() - started, self.device.reserved_bytes() - before, bitwise)


def _count(inputs: Inputs) -> int:
    """How many rows there are, which the latents say."""
    assert inputs[0] is not None
    return inputs[0].shape[0]


def _rows(example: Tensor, count: int) -> Tensor:
    """A static buffer of `count` rows holding the example's, repeated."""
    repeats = -(-count // example.shape[0])
    return example.repeat(repeats, *[1] * (example.dim() - 1))[:count].clone()


def graph_key(
    guidance_scale: float | None, latents: Tensor, labels: Tensor | None, module: nn.Module | None
) -> GraphKey:
    """The key of a batch under the present global switches."""
    described = None if labels is None else (labels.dtype, tuple(labels.shape[1:]))
    return GraphKey(guidance_scale, described, (latents.dtype, tuple(latents.shape[1:])), numerics(module))
