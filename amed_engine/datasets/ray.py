"""A dataset drawn by a cluster: Ray Data hands shards to stateful actors, and each makes its sampler once.

Ray runs again what it lost with an actor, so a shard may be asked for more than once. That each sample is there once is the
work of the claims, the ledger and the rename, as with processes of one machine: the folder has to be on storage that all nodes
share. Ray's own file sinks write under the final names, which carry an id of the run, and its checkpoints filter rows, which
would change the batches.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from amed_engine.datasets.drawing import Missing
from amed_engine.datasets.folder import check_hashes, open_folder, overwrite_folder, tidy
from amed_engine.datasets.generate import (
    MAKERS,
    DatasetReport,
    check_ended,
    in_other_hands,
    open_made,
    report_of,
)
from amed_engine.datasets.interrupts import Interrupts
from amed_engine.datasets.job import whole_number
from amed_engine.datasets.progress import Progress
from amed_engine.datasets.ray_actors import TRIES, Drawer, Foreman, described, verified
from amed_engine.datasets.seeds import Seeds
from amed_engine.datasets.sources import Source
from amed_engine.errors import ConfigError, require

OBJECTS = 100 << 20  # bytes of the object store of a local Ray: numbers of shards are all that goes through it
PATIENCE = 10.0  # seconds for the cluster's head to answer
EVERY = 0.5  # seconds between looks at an interrupt

Making = Callable[[], Source]


def generate(
    source: Callable[[], Any],
    seeds: str | Iterable[int],
    out: str | os.PathLike,
    *,
    address: str | None = None,
    actors: int | tuple[int, int] | None = None,
    num_cpus: float | None = None,
    num_gpus: float = 0,
    class_labels: Any = None,
    guidance_scale: float | None = None,
    format: str = "png",
    shard: int = 1000,
    batch: int | None = None,
    threads: int = 1,
    stored: str | None = None,
    overwrite: bool = False,
    check: bool = False,
    verify: int = 0,
    progress: bool = False,
    **options: Any,
) -> DatasetReport:
    """`generate_dataset` by the actors of a Ray cluster: the same folder, bytes and report.

    source: a function without arguments that makes what is drawn from; each actor calls it once. out: a folder on storage that
        all nodes share, an absolute path unless Ray runs here alone.
    address: of the cluster, "auto" for the one that this node belongs to; None is RAY_ADDRESS, which `ray job submit` sets, or
        what this process is connected to, or else a Ray of this machine that ends with the call.
    actors: how many; (least, most) lets Ray Data decide on the way; None is as many as there is room for.
    num_cpus, num_gpus: of each actor; num_cpus is `threads` unless given.
    All else as of `generate_dataset`. An actor that dies costs its open shard, which another one draws.
    Raises ConfigError, too, where no node has room for an actor; AmedError where an actor failed, with what it said.
    """
    started = time.perf_counter()
    _check(source, actors, verify)
    ray = require("ray", "ray", "drawing a dataset on a cluster")
    require("ray.data", "ray", "drawing a dataset on a cluster")
    making = functools.partial(open_made, source, threads, guidance_scale, stored, options)
    with _connected(ray, address) as alone:
        folder = _folder(out, alone)
        pool = Pool(ray, actors, threads if num_cpus is None else num_cpus, num_gpus)
        wanted = (Seeds.of(seeds), class_labels, format, shard, batch, threads)
        job, labels, here = pool.ask(described, making, *wanted)
        if overwrite:
            overwrite_folder(folder)
        with open_folder(folder, job, here) as (job, first):
            if check:
                check_hashes(folder, job)
            missing = Missing(folder, job, run=secrets.token_hex(8))
            drawer = {"making": making, "labels": labels, "first": first, "missing": missing}
            shown = Progress(len(job.seeds), missing.samples, progress)
            with Interrupts(said=progress) as interrupts:
                errors = _draw(pool, missing, drawer, shown, interrupts.asked)
            interrupted, held = interrupts.asked.is_set(), in_other_hands(missing)
            check_ended(errors, missing, held, interrupted)
            again = 0 if interrupted or not verify else pool.ask(verified, making, folder, job, labels, verify)
    return report_of(missing, shown, started, held, again, interrupted)


def _check(source: Any, actors: Any, verify: Any) -> None:
    if not isinstance(source, MAKERS):
        raise ConfigError(
            f"a cluster needs a function that makes the source in each actor, got {type(source).__name__}; pass one without "
            "arguments that returns it"
        )
    if actors is not None:
        least, most = _pair(actors)
        whole_number("actors", most, whole_number("actors", least, 1))
    whole_number("verify", verify, 0)


def _pair(actors: Any) -> tuple[Any, Any]:
    return actors if isinstance(actors, tuple) and len(actors) == 2 else (actors, actors)


@contextlib.contextmanager
def _connected(ray: ModuleType, address: str | None) -> Iterator[bool]:
    """Connected to a cluster; whether it is a Ray of this process alone. Raises ConfigError."""
    there = ray.is_initialized()
    if there and address is not None:
        raise ConfigError(f"this process is connected to a Ray cluster already: leave address={address!r} out")
    address = address or os.environ.get("RAY_ADDRESS")
    alone = not there and not address
    try:
        _check_listening(address or "")
        if alone:
            ray.init(address="local", include_dashboard=False, object_store_memory=OBJECTS)
        elif not there:
            ray.init(address=address)
    except ConnectionError as error:
        raise ConfigError(
            f"there is no Ray cluster at {address!r} ({error}); start one by `ray start --head`, or leave the address out"
        ) from error
    try:
        yield alone
    finally:
        if not there:
            ray.shutdown()


def _check_listening(address: str) -> None:
    """Raise ConnectionError where nothing answers at host:port, for which Ray would wait without end."""
    if (match := re.fullmatch(r"\[?([^/\[\]]+)\]?:([0-9]{1,5})", address)) is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers: {error}") from error


def _folder(out: str | os.PathLike, alone: bool) -> Path:
    folder = Path(out)
    if not alone and not folder.is_absolute():
        raise ConfigError(
            f"{folder} is another folder on every node; pass an absolute path on storage that all of them share"
        )
    return folder.absolute()


class Pool:
    """Room for actors in a cluster. Raises ConfigError where there is none."""

    def __init__(self, ray: ModuleType, actors: int | tuple[int, int] | None, num_cpus: float, num_gpus: float):
        self.ray, self.resources = ray, {"num_cpus": num_cpus, "num_gpus": num_gpus}
        room = self._room()
        self.sizes = _pair(actors or room)

    def _room(self) -> int:
        """How many actors all nodes together hold."""
        wanted = {"CPU": self.resources["num_cpus"], "GPU": self.resources["num_gpus"]}
        if not all(isinstance(n, (int, float)) and n >= 0 for n in wanted.values()) or not any(wanted.values()):
            raise ConfigError(f"num_cpus and num_gpus must be numbers of at least 0, not both 0; got {self.resources}")
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        fits = [min(int(node.get(name, 0) / n) for name, n in wanted.items() if n) for node in nodes]
        if sum(fits) == 0:
            most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
            raise ConfigError(
                f"no node has room for an actor of {wanted['CPU']} CPUs and {wanted['GPU']} GPUs; the largest have "
                f"{most['CPU']:g} and {most['GPU']:g}: ask for less (num_cpus, num_gpus), or add a node"
            )
        return sum(fits)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function answers on a node with an actor's resources."""
        try:
            return self.ray.get(self.ray.remote(**self.resources)(function).remote(*arguments))
        except self.ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", error) from None

    def map(self, shards: list[int], arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The rows of `Drawer`, a shard each, as they come. Raises RayError where actors cannot be started."""
        data = self.ray.data
        least, most = (min(size, len(shards)) for size in self.sizes)
        strategy = data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=1)
        with _settings(data.DataContext.get_current()):
            # in memory, a block each: reading would be tasks, which wait forever where actors hold all CPUs
            rows = data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
            rows = rows.map_batches(
                Drawer, batch_size=1, fn_constructor_kwargs=arguments, compute=strategy, **self.resources
            )
            yield from rows.iter_rows()


@contextlib.contextmanager
def _settings(context: Any) -> Iterator[None]:
    """Ray Data's, for the time being: one death of a starting actor would end all."""
    wanted = {"enable_progress_bars": False, "max_consecutive_actor_init_deaths": TRIES}
    before = {name: getattr(context, name) for name in wanted if hasattr(context, name)}
    for name in before:
        setattr(context, name, wanted[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _draw(
    pool: Pool, missing: Missing, arguments: dict[str, Any], shown: Progress, asked: threading.Event
) -> list[str]:
    """Draw what is missing, in rounds: others may leave theirs meanwhile. What actors said that failed."""
    foreman = pool.ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Foreman).remote()
    ended, errors, samples = threading.Event(), [], -1
    threading.Thread(target=_watch, args=(asked, ended, foreman), daemon=True).start()
    before = missing.samples
    try:
        while not errors and not asked.is_set() and samples < missing.samples < len(missing.job.seeds):
            samples = missing.samples
            shards = [shard for shard in range(missing.job.shards) if shard not in missing.there]
            errors = _round(pool, shards, {**arguments, "foreman": foreman}, shown)
            missing.refresh()
    finally:
        ended.set()
        shown.close()
        tidy(missing.folder)
    shown.done = missing.samples - before  # an actor that died after its shard was there told nobody
    return errors


def _round(pool: Pool, shards: list[int], arguments: dict[str, Any], shown: Progress) -> list[str]:
    errors = []
    try:
        for row in pool.map(shards, arguments):
            shown.drew(row["drew"], row["drawing"])
            shown.wrote(row["wrote"], row["writing"])
            if row["error"]:
                errors.append(row["error"])
                arguments["foreman"].stop.remote()
    except pool.ray.exceptions.RayError as error:
        errors.append(f"Ray gave up: {str(error).strip().splitlines()[-1]}")
    return errors


def _watch(asked: threading.Event, ended: threading.Event, foreman: Any) -> None:
    """Tell the actors of an interrupt."""
    while not ended.wait(EVERY):
        if asked.is_set():
            foreman.stop.remote()
            return
