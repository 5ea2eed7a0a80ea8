"""Several processes of one machine on one dataset: this one and others, which open the source themselves. Each draws what no
other has claimed.

A pipe for each, no lock, queue or barrier between them: one that is killed costs its open shard alone, and one whose parent is
gone notices with its next batch, since nobody reads its pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amed_engine.datasets.drawing import Missing, draw_missing
from amed_engine.datasets.interrupts import Interrupts
from amed_engine.datasets.job import Job, decisive, difference
from amed_engine.datasets.progress import Progress
from amed_engine.datasets.sources import Source
from amed_engine.errors import AmedError, ConfigError

EVERY = 0.5  # seconds between looks at an interrupt
PATIENCE = 10.0  # seconds for a worker that was told to give up

Making = Callable[[], Source]


def draw_in_workers(
    workers: int,
    making: Making,
    missing: Missing,
    source: Source,
    labels: np.ndarray | None,
    progress: Progress,
    asked: threading.Event,
) -> list[str]:
    """Draw what is missing in so many processes, this one among them, from its source; what those that ended early said, if
    any did. What they made is kept.

    asked: that they end after their open shards.
    """
    try:
        pickle.dumps(making)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"workers cannot be handed what makes the source: {error}; pass a function of a module, without arguments"
        ) from error
    job, context = missing.job, multiprocessing.get_context("spawn")
    pipes: dict[Connection, BaseProcess] = {}
    sent = labels[:1] if labels is not None and not isinstance(job.labels, dict) else labels  # one for all
    errors: list[str] = []
    try:
        for number in range(1, workers):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (making, missing.folder, job, sent, number, theirs)
            process = context.Process(target=_work, args=arguments, daemon=True)
            with _deaf():
                process.start()
            theirs.close()
            pipes[ours] = process
        following = threading.Thread(target=_follow, args=(dict(pipes), progress, asked, errors), daemon=True)
        following.start()
        try:
            draw_missing(missing, source, labels, progress, asked.is_set)
        except Exception as error:  # ends this process's part alone, as it would another's
            errors.append(told(error))
        following.join()
    finally:
        _end(list(pipes.values()))
    return errors


def _follow(
    pipes: dict[Connection, BaseProcess], progress: Progress, asked: threading.Event, errors: list[str]
) -> None:
    stopped = False
    while pipes:
        if asked.is_set() and not stopped:
            stopped = True
            for process in pipes.values():
                process.terminate()
        for pipe in wait(list(pipes), EVERY):
            assert isinstance(pipe, Connection)
            try:
                what, *values = pipe.recv()
            except (EOFError, OSError):
                errors.extend(_ended(pipes.pop(pipe), stopped))
                continue
            if what == "error":
                errors.extend(values)
            else:
                getattr(progress, what)(*values)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """A process started meanwhile never hears SIGINT, from its first moment on; what comes here is heard afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ended(process: BaseProcess, stopped: bool) -> list[str]:
    process.join()
    code = process.exitcode or 0
    if code == 0 or (stopped and code == -signal.SIGTERM):  # before it listened
        return []
    if code < 0:
        return [f"a worker was killed by {signal.Signals(-code).name}"]
    return [
        f"a worker ended with exit code {code}, and stderr says why (a script starts workers under "
        '`if __name__ == "__main__":` alone)'
    ]


def _end(processes: Sequence[BaseProcess]) -> None:
    """Those that still run give up their open shards; after PATIENCE they are killed."""
    for patience in (0.2, PATIENCE):  # told once they would finish their shards
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.terminate()
        until = time.monotonic() + patience
        for process in alive:
            process.join(max(0.0, until - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()


class Reports(Progress):
    """The progress of a worker, told to its parent."""

    def __init__(self, pipe: Connection):
        super().__init__(0, 0, shown=False)
        self.pipe, self.sending = pipe, threading.Lock()

    def send(self, *message: Any) -> None:
        with self.sending:
            self.pipe.send(message)

    def drew(self, samples: int, seconds: float) -> None:
        self.send("drew", samples, seconds)

    def wrote(self, samples: int, seconds: float) -> None:
        self.send("wrote", samples, seconds)

    def published(self, samples: int) -> None:
        self.send("published", samples)


def _work(making: Making, folder: Path, job: Job, labels: np.ndarray | None, number: int, pipe: Connection) -> None:
    labels = None if labels is None else np.broadcast_to(labels, (len(job.seeds), *labels.shape[1:]))
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(number % torch.cuda.device_count())
    torch.set_num_threads(job.threads)
    reports = Reports(pipe)
    with Interrupts((signal.SIGTERM,)) as interrupts:
        try:
            source = making()
            check_same(job, source)
            draw_missing(Missing(folder, job), source, labels, reports, interrupts.asked.is_set)
        except (KeyboardInterrupt, BrokenPipeError):  # told twice, or nobody is there to tell
            return
        except Exception as error:
            reports.send("error", told(error))


def check_same(job: Job, source: Source) -> None:
    """Raise ConfigError where what was made here is not what the job draws from."""
    if (found := difference(job, replace(job, source=decisive(source.identity)))) is not None:
        raise ConfigError(f"the function makes another source in a worker: {found}")


def told(error: Exception) -> str:
    """An error for somebody in another process: ours say what to do, others at least what they are."""
    return str(error) if isinstance(error, AmedError) else f"{type(error).__name__}: {error}"
