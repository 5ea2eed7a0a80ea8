"""A folder in Zarr's format 3: a group of images (N, H, W, C) or samples (N, C, ...), seeds, labels and sha256.

The description is the group's attributes. A chunk is a batch, stored as it is: a reader needs no more memory than the files
have bytes, whatever they claim.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from amed_engine.datasets.formats.format import Format
from amed_engine.datasets.formats.shard import CLASS, Header, Rows, Shard, Writer
from amed_engine.datasets.samples import Samples
from amed_engine.errors import FileFormatError, require
from amed_engine.solvers.files import MAX_BYTES

LIBRARY = "zarr"
METADATA = "zarr.json"


class ZarrWriter(Writer):
    def __init__(self, path: Path, header: Header):
        super().__init__(header)
        library = require(LIBRARY, "datasets", "the format zarr")
        self._group = library.create_group(str(path), zarr_format=3)

    def _write(self, samples: Samples) -> None:
        start = self._added - len(samples)
        if not start:
            shape = (self.header.count, *self.header.shape)
            self._images = self._array(images(self.header), shape, len(samples), samples.arrays.dtype)
        self._images[start : self._added] = samples.arrays

    def _array(self, name: str, shape: tuple[int, ...], chunk: int, dtype: np.dtype) -> Any:
        plain = {"compressors": None, "filters": None, "fill_value": 0, "config": {"write_empty_chunks": True}}
        return self._group.create_array(name, shape=shape, chunks=(chunk, *shape[1:]), dtype=dtype, **plain)

    def _finish(self, rows: Rows, text: str) -> None:
        for name, values in columns(rows).items():
            self._array(name, values.shape, len(values), values.dtype)[:] = values
        self._group.update_attributes(json.loads(text))


def images(header: Header) -> str:
    """Name of the array of samples."""
    return "images" if header.dtype == "uint8" else "samples"


def columns(rows: Rows) -> dict[str, np.ndarray]:
    labels = {} if rows.labels is None else {"labels": rows.labels}
    return {"seeds": rows.seeds, **labels, "sha256": rows.digests}


class ZarrShard(Shard):
    def __init__(self, path: Path):
        files = [file for file in path.rglob("*") if file.is_file()]
        if any(file.stat().st_size > 2 * MAX_BYTES for file in files if file.name == METADATA):
            raise FileFormatError(f"a {METADATA} has more than {2 * MAX_BYTES} bytes")
        library = require(LIBRARY, "datasets", "the format zarr")
        self._group = library.open_group(str(path), mode="r", zarr_format=3, use_consolidated=False)
        text = json.dumps(dict(self._group.attrs), ensure_ascii=True)
        self.header, self.checksum = Header.sealed(text.encode())
        size = sum(file.stat().st_size for file in files)
        self.bounded(size)
        count, labels = self.header.count, self.header.labels
        self._images = self._array(images(self.header), (count, *self.header.shape), self.header.dtype, size)
        seeds, digests = (
            self._array("seeds", (count,), "int64", size),
            self._array("sha256", (count, 32), "uint8", size),
        )
        self.rows = Rows(seeds[:], None if labels is None else self._labels(size)[:], digests[:])

    def _labels(self, size: int) -> Any:
        count, labels = self.header.count, self.header.labels
        if labels == CLASS:
            return self._array("labels", (count,), "int64", size)
        return self._array("labels", (count, int(labels or 0)), "float32", size)

    def _array(self, name: str, shape: tuple[int, ...], dtype: str, size: int) -> Any:
        """Not read yet: plain numbers in chunks along the first axis alone, no more of them than `size` bytes are."""
        found = self._group[name]
        said = found.metadata.to_dict()
        codecs = [codec["name"] for codec in said["codecs"]]
        if (found.shape, str(found.dtype)) != (shape, dtype) or found.chunks[1:] != shape[1:] or codecs != ["bytes"]:
            raise FileFormatError(
                f"{name} is {found.dtype} {found.shape} in chunks {found.chunks}, {', '.join(codecs)}"
            )
        if said.get("storage_transformers") or int(np.prod(found.chunks, dtype=object)) * found.dtype.itemsize > size:
            raise FileFormatError(f"{name} claims chunks of {found.chunks}, more than its {size} bytes hold")
        return found

    def arrays(self, batch: int) -> Iterator[np.ndarray]:
        chunk = self._images.chunks[0]  # each is read once, whatever the batch
        for start in range(0, self.header.count, chunk):
            found = self._images[start : start + chunk]
            for part in range(0, len(found), batch):
                yield found[part : part + batch]


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Shard]:
    yield ZarrShard(path)


ZARR = Format("zarr", ".zarr", ZarrWriter, _reader, folder=True, library=LIBRARY)
