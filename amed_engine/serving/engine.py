"""`ContinuousSampler(model).submit(seeds)`: many requests at once, by any solvers, in rows of one batch."""

from __future__ import annotations

import asyncio
import inspect
import os
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.engine.capture import CudaDevice
from amed_engine.engine.graphs import WarmupReport
from amed_engine.engine.model import check_guidance, place, tune
from amed_engine.engine.request import shape_of
from amed_engine.engine.resolve import resolve
from amed_engine.engine.result import SampleResult
from amed_engine.engine.runner import Runner
from amed_engine.errors import ConfigError
from amed_engine.sampling.modes import plain_tensors
from amed_engine.sampling.offloaded import brings_weights
from amed_engine.sampling.predictors import AMEDPredictor, Predictor
from amed_engine.serving.asked import Orders, check_settings
from amed_engine.serving.loop import Loop
from amed_engine.serving.order import Sample
from amed_engine.serving.predictors import check_given, open_given
from amed_engine.serving.programs import Programs
from amed_engine.serving.rows import Kind, Rows
from amed_engine.serving.scheduler import Scheduler
from amed_engine.serving.stats import ServingStats
from amed_engine.serving.threads import handed_over
from amed_engine.serving.ticker import Ticker, check_batches, check_buckets
from amed_engine.solvers.arguments import is_number, told
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.plan import Plan


class Cost(NamedTuple):
    """What a request would take: network evaluations in all, and seconds from now if nothing else came (None: no tick was
    measured yet, see `warmup`)."""

    samples: int
    evaluations: int
    seconds: float | None


class ContinuousSampler:
    """Draws many requests at once: each sample is a row, and one evaluation of the network takes all rows a step further,
    whatever their solvers, noise levels, numbers of evaluations, guidance and classes are. What comes waits for a free row,
    not for a batch to end.

    model, device, compile, autocast, dtype, shape, label_dim, sigma_min, sigma_max, weights, memory_format, verify,
        check_finite: as of `Sampler`.
    rows: samples at once; those that wait beyond are at most `queue`.
    backend: "auto" captures the tick as CUDA graphs on a GPU and runs eagerly elsewhere; "graph" insists, "eager" never does.
    buckets: the sizes of ticks, the smallest that holds the live rows runs; None is powers of two for graphs, and just the
        live rows eagerly. There are no more rows than the largest, which pads where it is larger. With buckets given,
        guidance's halves are evaluated by a call of their own, and a sample's last bits depend on the buckets that ran alone,
        which its result names: with one bucket they are the same in any company.
    history: how many evaluations back a solver's directions may reach, at most 13; programs that reach further, and those of
        parallel points or thresholding, are drawn by `Sampler.run`'s loop beside the rows, one request after another.
    predictors: files or predictors, one for each NFE, which draw what names nothing but perhaps the NFE (without: the one for
        5, else the first), as those that a zoo model brings and in their place. Under guidance that they were not trained for
        a training-free solver steps in. Their plans say the noise levels: sigma_min and sigma_max are not to be given.
    Raises ConfigError for anything that cannot work, FileFormatError for files that are none.

    Threads may share it; it has threads of its own, which `close` ends.
    """

    @plain_tensors()
    def __init__(
        self,
        model: Any,
        rows: int = 64,
        device: torch.device | str | None = None,
        backend: str = "auto",
        compile: str | None = None,
        autocast: torch.dtype | None = None,
        history: int = 10,
        buckets: Sequence[int] | None = None,
        queue: int = 1024,
        *,
        dtype: torch.dtype = torch.float32,
        shape: tuple[int, ...] | None = None,
        label_dim: int | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        weights: str | os.PathLike | None = None,
        memory_format: torch.memory_format | None = None,
        verify: bool = True,
        check_finite: bool = True,
        predictors: Sequence[Predictor | str | os.PathLike] = (),
    ):
        own = open_given(predictors)
        check_settings(rows=rows, history=history, queue=queue, dtype=dtype, backend=backend)
        facts = {"shape": shape, "label_dim": label_dim, "sigma_min": sigma_min, "sigma_max": sigma_max}
        self.model = resolve(model, weights=weights, ready=False, **facts)  # type: ignore[arg-type]
        if own:
            self.model = replace(self.model, predictors={nfe: given.predictor for nfe, given in own.items()})
        self.device, self.dtype = place(self.model, device), dtype
        tuned = tune(self.model, compile=compile, memory_format=memory_format, autocast=autocast)
        runner = Runner(tuned, self.device, "eager", (1,), check_finite)
        captures = self._captures(backend)
        sizes = check_buckets(buckets, rows, captures)
        self.rows = rows if sizes is None else min(rows, sizes[-1])
        most = check_batches(self.model.network, sizes, self.rows)
        apart = buckets is not None or most < 2 * self.rows
        count = max(self.rows, sizes[-1] if sizes else 0)
        state = Rows(tuned, count, shape_of(self.model), history, self.device, dtype, apart=apart)
        ticker = Ticker(state, sizes, CudaDevice(self.device) if captures else None)
        self.conditions = state.conditions  # what rows are told beside classes; None for a network that takes none
        programs = Programs(self.model, tuned, history=history, verify=verify, device=self.device, dtype=dtype)
        levels = {"sigma_min": sigma_min, "sigma_max": sigma_max}
        check_given(own, programs, levels)
        self._orders = Orders(self.model, programs, state, levels, self.rows + queue)
        self._loop = Loop(state, ticker, runner, Scheduler(self.rows, queue))
        # Also at the interpreter's end, where a thread that still runs torch would be cut off.
        self._finalizer = weakref.finalize(self, self._loop.close, False, 10.0)

    def __repr__(self) -> str:
        name = self.model.name or type(self.model.network).__name__
        return f"ContinuousSampler({name}, {self.rows} rows on {self.device}{', closed' if self.closed else ''})"

    def __enter__(self) -> ContinuousSampler:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(drain=kind is None)

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._loop.closing

    def submit(
        self,
        seeds: int | Sequence[int] | Tensor,
        class_labels: int | float | Sequence | Tensor | None = None,
        nfe: int | None = None,
        solver: str | None = None,
        predictor: Any = None,
        plan: Plan | str | os.PathLike | None = None,
        guidance_scale: float | None = None,
        deadline: float | None = None,
        priority: int = 0,
        on_sample: Callable[[Sample], None] | None = None,
        *,
        solver_options: Mapping[str, Any] | None = None,
        schedule: str | Tensor | None = None,
        rho: float | None = None,
        afs: FirstStep | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Future[SampleResult]:
        """Ask for samples; they are those of `Sampler.run` but for the last bits.

        seeds, class_labels, guidance_scale: as `batch`, ... of `Sampler.run`. nfe (5 where nothing else says), solver,
            solver_options, predictor, plan, schedule, rho, afs: as of `Sampler`.
        deadline: seconds from now. A request that cannot be done by then is refused, or fails while nothing of it has
            started; one that runs is finished. priority: larger first, among requests of one deadline or none.
        on_sample: called with each `Sample` as it is done, in any order, by a thread of the engine; the next waits for it.
        conditions: tensors (1 or B, ...) by name, in place of class labels, for a network that `wrap` made with some: text
            embeddings, masks. Their shapes are the engine's from the first on.
        Returns a future of the result, to be cancelled at any time: its rows are free at the next tick. It raises
        NonFiniteError naming the seeds that failed, once the others are done; DeadlineError; EngineClosedError.
        Raises ConfigError, FileFormatError, QueueFullError, DeadlineError or EngineClosedError at once.
        """
        order = self._orders.make(
            seeds,
            class_labels,
            nfe=nfe,
            solver=solver,
            predictor=predictor,
            plan=plan,
            guidance_scale=guidance_scale,
            deadline=deadline,
            priority=priority,
            on_sample=on_sample,
            solver_options=solver_options,
            schedule=schedule,
            rho=rho,
            afs=afs,
            conditions=conditions,
        )
        order.owner = self
        self._loop.take(order)
        return order.future

    async def stream(
        self, seeds: int | Sequence[int] | Tensor, class_labels: Any = None, **options: Any
    ) -> AsyncIterator[Sample]:
        """Samples as they are done, `async for sample in engine.stream(seeds)`; options of `submit`. Leaving the loop cancels
        the rest. Raises what `submit` and its future raise."""
        if "on_sample" in options:
            raise TypeError("stream hands out the samples itself: leave on_sample out, or use submit")
        loop, done = asyncio.get_running_loop(), object()
        ready: asyncio.Queue[Any] = asyncio.Queue()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(ready.put_nowait, item)

        asked = partial(self.submit, seeds, class_labels, on_sample=put, **options)
        future = await handed_over(asked)
        future.add_done_callback(lambda _: put(done))
        try:
            while (sample := await ready.get()) is not done:
                yield sample
            future.result()
        finally:
            future.cancel()

    def cost(self, seeds: int | Sequence[int] | Tensor, class_labels: Any = None, **options: Any) -> Cost:
        """What a request of `submit`'s arguments would take. Raises ConfigError, FileFormatError."""
        asked = inspect.signature(self.submit).bind(seeds, class_labels, **options).arguments
        order = self._orders.make(asked.pop("seeds"), asked.pop("class_labels"), **asked)
        return Cost(order.samples, order.samples * order.programmed.plan.nfe, self._loop.seconds(order))

    def stats(self) -> ServingStats:
        """What it did so far."""
        return self._loop.stats()

    def warmup(self) -> WarmupReport:
        """Make the programs of the model's own predictors, capture the tick of every bucket, with predictors among the rows
        where it has some, and measure what ticks take; waits for the tick that runs."""
        learned = self._orders.programs.make_own(self._orders.given)
        return self._loop.between_ticks(partial(self._warm, learned))

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests and end: with drain after all that were taken are done, at most `timeout` seconds from now;
        what is left gets EngineClosedError. In a function that the engine calls (`on_sample`, a callback of a future) it
        does not wait. Raises ConfigError."""
        if not isinstance(drain, bool):
            raise ConfigError(f"drain must be True or False, got {told(drain)}")
        if timeout is not None and not is_number("close", "timeout", timeout, "seconds, or None to wait for all") >= 0:
            raise ConfigError(f"timeout must be seconds from now, or None to wait for all, got {told(timeout)}")
        self._loop.close(drain, timeout)

    def _captures(self, backend: str) -> bool:
        brings = brings_weights(self.model.module)
        if backend == "graph" and (self.device.type != "cuda" or brings):
            raise ConfigError(
                f"backend='graph' needs a CUDA device and weights that stay where they are, got {self.device}"
                f"{' and hooks that bring the weights' if brings else ''}; use backend='auto' or 'eager'"
            )
        return backend != "eager" and self.device.type == "cuda" and not brings

    def _warm(self, learned: AMEDPredictor | None) -> WarmupReport:
        ticker, pace = self._loop.ticker, self._loop.pace
        report = ticker.warmup(self._guidable(), learned)
        if self._loop.scheduler.live:
            return report
        sizes = ticker.buckets or sorted({1, self.rows})
        for size in [*sizes, *sizes]:  # the first of each is slower
            pace.start()
            ticker.tick(Kind(size))
            pace.end(size)
        return report

    def _guidable(self) -> bool:
        try:
            check_guidance(self.model, 2.0)
        except ConfigError:
            return False
        return True
