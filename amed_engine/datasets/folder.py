"""The folder of a dataset: opened for a job, compared with its hashes, emptied."""

from __future__ import annotations

import contextlib
import logging
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from amed_engine.datasets import claims as claims_of
from amed_engine.datasets import ledger as ledgers
from amed_engine.datasets.claims import Claims
from amed_engine.datasets.job import NAME, Job, difference, load_manifest, save_manifest
from amed_engine.datasets.ledger import Ledger
from amed_engine.datasets.shards import delete, hash_of
from amed_engine.errors import ConfigError
from amed_engine.solvers.targets import resolved
from amed_engine.solvers.temporary import is_there, lock, sweep

logger = logging.getLogger("amed_engine")

PATIENCE = 10.0  # seconds for a manifest that another is making or removing


@contextlib.contextmanager
def open_folder(folder: Path, job: Job, where: Mapping[str, Any]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """The job of the folder, which is this one in other words at most, and where it was first drawn, which is here for a new
    one; nobody overwrites it meanwhile. Raises ConfigError for another job's."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; a dataset needs one: choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    _check_parts(folder)
    if not (folder / NAME).exists():
        _check_free(folder)
        save_manifest(folder, job, where)
    _same(folder, job)
    tidy(folder)  # before the lock: a manifest that a kill interrupted has a second name
    with _locked(folder, shared=True):
        yield _same(folder, job)


def _same(folder: Path, job: Job) -> tuple[Job, dict[str, Any]]:
    """What the manifest says. Raises ConfigError for another job's."""
    theirs, first = load_manifest(folder)
    if (found := difference(theirs, job)) is not None:
        raise ConfigError(
            f"{folder} holds another dataset: {found}; choose another folder, or overwrite it (--overwrite, overwrite=True)"
        )
    return theirs, first


@contextlib.contextmanager
def _locked(folder: Path, shared: bool) -> Iterator[None]:
    """The manifest is locked: `shared` by all that draw, else by the one that removes it. Raises ConfigError where that cannot
    be, and where another removed it just now."""
    with open(folder / NAME, "rb" if shared else "rb+") as file:  # a network file system locks alone what it may write
        until = time.monotonic() + (PATIENCE if shared else 0.0)
        while (locked := lock(file.fileno(), shared=shared)) is False and time.monotonic() < until:
            time.sleep(0.05)
        if locked is False or not is_there(folder / NAME, file.fileno()):
            doing = "overwritten" if shared else "drawn into"
            raise ConfigError(
                f"{folder} is being {doing} by another process; wait for its end, or choose another folder"
            )
        yield


def tidy(folder: Path) -> None:
    """Remove what killed writers left; of a folder that cannot be written nothing."""
    try:
        sweep(folder)
        Claims(folder).tidy()
    except OSError as error:
        logger.warning("what killed runs left in %s stays there: %s", folder, error)


def _check_parts(folder: Path) -> None:
    """Raise ConfigError where something else has the name of what a dataset consists of."""
    for name in (NAME, ledgers.NAME):
        resolved(folder / name)
    claims, mode = folder / claims_of.FOLDER, stat.S_IFDIR
    with contextlib.suppress(FileNotFoundError):  # one look: another may remove the folder at any time
        mode = claims.lstat().st_mode
    if not stat.S_ISDIR(mode):
        raise ConfigError(
            f"{claims} is no folder, and a dataset has its claims there; move it away, or choose another folder"
        )


def _check_free(folder: Path) -> None:
    """Raise ConfigError where there are shards, or a ledger, without a manifest."""
    ours = [path.name for path in folder.iterdir() if ledgers.SHARD.fullmatch(path.name) or path.name == ledgers.NAME]
    if ours and not (folder / NAME).exists():  # another may have begun just now
        raise ConfigError(
            f"{folder} has {min(ours)} but no {NAME}, so nobody can tell what it holds; restore that, or choose another folder"
        )


def overwrite_folder(folder: Path) -> None:
    """Remove the dataset of a folder, no file but those of its ledger, and say so first. A folder without one stays as it is.

    Raises ConfigError while a living process draws into it, FileFormatError for what cannot be read.
    """
    if not (folder / NAME).exists():
        return
    _check_parts(folder)
    with _locked(folder, shared=False):
        _empty(folder)


def _empty(folder: Path) -> None:
    load_manifest(folder)
    if held := Claims(folder).held():
        shard, holder = next(iter(held.items()))
        raise ConfigError(
            f"{folder} is being drawn into: shard {shard} by {holder}; stop that first, or choose another folder"
        )
    ledger = Ledger(folder)
    entries = ledger.refresh().values()
    others = {path.name for path in folder.iterdir() if ledgers.SHARD.fullmatch(path.name)} - {e.name for e in entries}
    if others:
        raise ConfigError(
            f"{folder / min(others)} is not in the ledger: it is not of this dataset, or its line was lost; move it away"
        )
    logger.warning(
        "overwriting %s: removing %d shard(s), %d samples", folder, len(entries), sum(e.samples for e in entries)
    )
    for entry in entries:
        delete(folder, entry)
    tidy(folder)
    ledger.path.unlink(missing_ok=True)
    (folder / NAME).unlink()


def check_hashes(folder: Path, job: Job, stop: Callable[[], bool] = lambda: False) -> list[int]:
    """Remove the shards whose bytes are not those in the ledger, so that they are drawn again; their numbers.

    stop: says between shards that the others are left as they are.
    """
    claims, ledger, damaged = Claims(folder), Ledger(folder), []
    for shard, entry in ledger.refresh().items():
        if stop():
            break
        if not entry.is_there(folder) or hash_of(folder / entry.name) == entry.sha256:
            continue
        if (claim := claims.take(shard)) is not None:
            logger.warning("%s differs from its hash in the ledger: drawing it again", folder / entry.name)
            try:
                delete(folder, entry)
            finally:
                claim.release()
            damaged.append(shard)
    return damaged
