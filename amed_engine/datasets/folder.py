"""The folder of a dataset: opened for a job, compared with its hashes, emptied."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amed_engine.datasets import ledger as ledgers
from amed_engine.datasets.claims import Claims
from amed_engine.datasets.job import NAME, Job, difference, load_manifest, save_manifest
from amed_engine.datasets.ledger import Ledger
from amed_engine.datasets.shards import delete, hash_of
from amed_engine.errors import ConfigError
from amed_engine.solvers.temporary import sweep

logger = logging.getLogger("amed_engine")


def open_folder(folder: Path, job: Job, where: Mapping[str, Any]) -> dict[str, Any]:
    """Where the dataset in the folder was first drawn, which is here for a new one. Raises ConfigError for another job's."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; a dataset needs one: choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / NAME).exists():
        _check_free(folder)
        save_manifest(folder, job, where)
    theirs, first = load_manifest(folder)
    if (found := difference(theirs, job)) is not None:
        raise ConfigError(
            f"{folder} holds another dataset: {found}; choose another folder, or overwrite it (--overwrite, overwrite=True)"
        )
    sweep(folder)
    Claims(folder).tidy()
    return first


def _check_free(folder: Path) -> None:
    """Raise ConfigError where there are shards, or a ledger, without a manifest."""
    ours = [path.name for path in folder.iterdir() if ledgers.SHARD.fullmatch(path.name) or path.name == ledgers.NAME]
    if ours:
        raise ConfigError(
            f"{folder} has {min(ours)} but no {NAME}, so nobody can tell what it holds; restore that, or choose another folder"
        )


def overwrite_folder(folder: Path) -> None:
    """Remove the dataset of a folder, no file but those of its ledger, and say so first. A folder without one stays as it is.

    Raises ConfigError while a living process draws into it, FileFormatError for what cannot be read.
    """
    if not (folder / NAME).exists():
        return
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
        raise ConfigError(f"{folder / min(others)} is not in the ledger, so not of this dataset; move it away")
    logger.warning(
        "overwriting %s: removing %d shards, %d samples", folder, len(entries), sum(e.samples for e in entries)
    )
    for entry in entries:
        delete(folder, entry)
    sweep(folder)
    Claims(folder).tidy()
    ledger.path.unlink(missing_ok=True)
    (folder / NAME).unlink()


def check_hashes(folder: Path, job: Job) -> list[int]:
    """Remove the shards whose bytes are not those in the ledger, so that they are drawn again; their numbers."""
    claims, ledger, damaged = Claims(folder), Ledger(folder), []
    for shard, entry in ledger.refresh().items():
        claim = claims.take(shard) if entry.is_there(folder) and hash_of(folder / entry.name) != entry.sha256 else None
        if claim is not None:
            logger.warning("%s differs from its hash in the ledger: drawing it again", folder / entry.name)
            delete(folder, entry)
            claim.release()
            damaged.append(shard)
    return damaged
