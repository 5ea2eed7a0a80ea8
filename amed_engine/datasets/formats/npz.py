"""One .npz: arr_0 (N, H, W, C) uint8, as evaluators of images have it, or (N, C, ...) floats; seeds, labels, sha256, about.

Members are stored as they are, so a reader takes any part of arr_0 without the rest.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from amed_engine.datasets.formats.format import Format
from amed_engine.datasets.formats.shard import Header, Rows, Shard, Writer
from amed_engine.datasets.samples import Samples
from amed_engine.errors import FileFormatError
from amed_engine.solvers.files import MAX_BYTES

EPOCH = (1980, 1, 1, 0, 0, 0)  # the first day of zip files
MAX_HEADER = 10_000  # of an array, as numpy has it


class NpzWriter(Writer):
    def __init__(self, path: Path, header: Header):
        super().__init__(header)
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def _start(self) -> None:
        shape = (self.header.count, *self.header.shape)
        head = _head(shape, np.dtype(self.header.dtype))
        self._member = self._zip.open(_info("arr_0", len(head) + self.header.count * self.header.size), "w")
        self._member.write(head)

    def _write(self, samples: Samples) -> None:
        self._member.write(np.ascontiguousarray(samples.arrays).data.cast("B"))

    def _finish(self, rows: Rows, text: str) -> None:
        self._member.close()
        members = {
            "seeds": rows.seeds,
            "labels": rows.labels,
            "sha256": _hexadecimal(rows.digests),
            "about": np.array(text),
        }
        for name, array in members.items():
            if array is not None:
                data = _head(array.shape, array.dtype) + array.tobytes()
                self._zip.writestr(_info(name, len(data)), data)
        self._zip.close()

    def _abandon(self) -> None:
        if file := self._zip.fp:
            self._zip.fp = None  # nothing more is to be written
            file.close()


def _info(name: str, size: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f"{name}.npy", EPOCH)
    info.create_system, info.external_attr, info.file_size = 3, 0o600 << 16, size
    return info


def _head(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    head = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, description)
    return head.getvalue()


def _hexadecimal(digests: np.ndarray) -> np.ndarray:
    return np.array([digest.tobytes().hex() for digest in digests], "S64")


class NpzShard(Shard):
    def __init__(self, archive: zipfile.ZipFile, size: int):
        self._zip = archive
        names = set(archive.namelist())
        if len(archive.namelist()) > len(names) or names - {"labels.npy"} != {
            "arr_0.npy",
            "seeds.npy",
            "sha256.npy",
            "about.npy",
        }:
            raise FileFormatError(
                f"it holds {', '.join(sorted(names)[:6])}; expected arr_0, seeds, labels, sha256 and about"
            )
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > size for info in archive.infolist()):
            raise FileFormatError("its members are compressed, or claim more bytes than it has")
        self.header, self.checksum = Header.sealed(str(self._small("about", 4 * 2 * MAX_BYTES)).encode())
        self.bounded(size)
        labels = self._small("labels", size) if "labels.npy" in names else None
        digests = np.frombuffer(bytes.fromhex(b"".join(self._small("sha256", size).tolist()).decode()), np.uint8)
        self.rows = Rows(self._small("seeds", size), labels, digests.reshape(-1, 32))

    def _small(self, name: str, most: int) -> np.ndarray:
        """An array whose bytes are all there, and are no more."""
        data = self._zip.open(f"{name}.npy").read(most + 1)
        stream = io.BytesIO(data)
        shape, dtype = read_head(stream)
        array = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
        if name == "sha256" and dtype.kind != "S":
            raise FileFormatError(f"sha256 has dtype {dtype}, expected S64")
        return array

    def arrays(self, batch: int) -> Iterator[np.ndarray]:
        with self._zip.open("arr_0.npy") as member:
            shape, dtype = read_head(member)
            if shape != (self.header.count, *self.header.shape) or dtype != np.dtype(self.header.dtype):
                raise FileFormatError(f"arr_0 is {dtype} {shape}, announced {self.header.count} {self.header.shape}")
            yield from streamed(member, shape, dtype, batch)
            if member.read(1):
                raise FileFormatError("arr_0 is longer than it says")


def read_head(stream) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array of plain numbers or text that a .npy stream announces, in C order. Raises ValueError."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise FileFormatError(f"an array is of version {version}, expected 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=MAX_HEADER)
    if fortran or dtype.kind not in "uifSU" or not dtype.itemsize:
        raise FileFormatError(
            f"an array is {dtype} in {'Fortran' if fortran else 'C'} order, expected plain numbers in C order"
        )
    return shape, dtype


def streamed(stream, shape: tuple[int, ...], dtype: np.dtype, batch: int) -> Iterator[np.ndarray]:
    """An array's rows, at most `batch` at a time, from its bytes. Raises FileFormatError where they end too early."""
    size = dtype.itemsize * int(np.prod(shape[1:], dtype=object))
    for start in range(0, shape[0], batch):
        count = min(batch, shape[0] - start)
        data = stream.read(count * size)
        if len(data) != count * size:
            raise FileFormatError(f"arr_0 ends within its rows {start} to {start + count}")
        yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Shard]:
    with zipfile.ZipFile(path) as archive:
        yield NpzShard(archive, path.stat().st_size)


NPZ = Format("npz", ".npz", NpzWriter, _reader)
