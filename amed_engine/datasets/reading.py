"""Samples that are there, as a stream: of a dataset's folder, of one of its shards, of any .npz with images in arr_0."""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amed_engine.datasets import job as jobs
from amed_engine.datasets.formats import FORMATS, Format
from amed_engine.datasets.formats import png as pngs
from amed_engine.datasets.formats.npz import read_head, streamed
from amed_engine.datasets.formats.shard import Header
from amed_engine.datasets.ledger import Entry, Ledger
from amed_engine.datasets.samples import Samples
from amed_engine.datasets.shards import MODULUS, sum_of
from amed_engine.errors import FileFormatError
from amed_engine.solvers.files import MAX_BYTES

logger = logging.getLogger("amed_engine")

ARRAY = "arr_0.npy"


@dataclass(frozen=True)
class Stored:
    """Samples in files. count: how many; about: what the job says of itself; `batches` reads them."""

    path: Path
    count: int
    about: dict[str, Any]
    shards: tuple[tuple[Format, Path, Entry | None], ...]

    def batches(self, batch: int = 64) -> Iterator[Samples]:
        """Shard after shard, at most `batch` samples at a time, each compared with its hash, a shard of a folder with its entry
        in the ledger too. Raises FileFormatError naming the shard."""
        for format, path, entry in self.shards:
            total = 0
            for samples in format.read(path, batch):
                total += sum_of(samples) if entry else 0
                yield samples
            if entry is not None and f"{total % MODULUS:064x}" != entry.sum:
                raise FileFormatError(f"{path} holds other samples than the ledger lists; draw it again with --check")


def open_samples(path: str | os.PathLike) -> Stored:
    """A dataset's folder, with the shards of its ledger that are there, or one shard, whose format its name says.

    Raises FileFormatError, and MissingDependency without the format's library.
    """
    path = Path(path)
    if is_dataset(path):
        return _folder(path)
    format = format_of(path)
    if format is None:
        raise FileFormatError(
            f"{path} holds no samples: expected the folder of `amed generate`, or a shard of it: "
            f"{', '.join(format.suffix for format in FORMATS.values() if format.suffix)} or a folder of PNG with {pngs.ABOUT}"
        )
    header = format.header(path)
    return Stored(path, header.count, header.about, ((format, path, None),))


def _folder(folder: Path) -> Stored:
    job, _ = jobs.load_manifest(folder)
    listed = [entry for number, entry in sorted(Ledger(folder).refresh().items()) if number < job.shards]
    there = [entry for entry in listed if entry.is_there(folder)]
    count = sum(entry.samples for entry in there)
    if not there:
        raise FileFormatError(f"{folder} has no finished shards yet; go on with `amed generate`")
    if count < len(job.seeds):
        logger.warning("%s has %d of its %d samples so far", folder, count, len(job.seeds))
    return Stored(folder, count, dict(job.about), tuple((job.kind, folder / entry.name, entry) for entry in there))


def is_dataset(path: Path) -> bool:
    """Whether it is a folder with a manifest of ours, whatever state that is in."""
    return path.is_dir() and "amed_dataset" in _start(path / jobs.NAME)


def format_of(path: Path) -> Format | None:
    """Of one shard: by its name, of a folder of PNG and an .npz by what is in it. None for what is no shard."""
    if path.is_dir() and path.suffix != FORMATS["zarr"].suffix:
        return FORMATS["png"] if '"checksum"' in _start(path / pngs.ABOUT) else None
    if path.suffix == FORMATS["npz"].suffix:
        return FORMATS["npz"] if {ARRAY, "about.npy"} <= members(path) else None
    return next((format for format in FORMATS.values() if path.suffix and format.suffix == path.suffix), None)


def _start(path: Path) -> str:
    """A small file's text; none of one that is not there."""
    with contextlib.suppress(OSError):
        if path.is_file():  # opening a FIFO would wait for its writer
            with path.open("rb") as file:
                return file.read(MAX_BYTES).decode("utf-8", "replace")
    return ""


def members(path: Path) -> set[str]:
    """Names in an .npz; none where it is none."""
    with contextlib.suppress(OSError, zipfile.BadZipFile, NotImplementedError):
        if path.is_file():
            with zipfile.ZipFile(path) as archive:
                return set(archive.namelist())
    return set()


def read_arrays(path: Path, batch: int) -> Iterator[np.ndarray]:
    """arr_0 of any .npz, pictures (N, H, W, 1 or 3) uint8, at most `batch` at a time. Raises FileFormatError."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(ARRAY) as member:
            shape, dtype = read_head(member)
            if len(shape) != 4 or not shape[0]:
                raise FileFormatError(f"arr_0 has shape {shape}, expected pictures (N, H, W, 1 or 3)")
            header = Header(shape[0], shape[1:], str(dtype), {}).check()
            if header.dtype != "uint8":
                raise FileFormatError(f"arr_0 is {dtype}, expected pictures of bytes (N, H, W, 1 or 3)")
            yield from streamed(member, shape, dtype, header.at_once(batch))
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # zipfile and numpy raise all kinds of errors for damaged bytes
        raise FileFormatError(f"{path} is no .npz of pictures, or damaged: {error}") from error
