"""A tar of the webdataset library: 000042.png (or .npy for floats), .cls (a class), .json: seed, class or labels, sha256.

The shard's description is the last member, __about__, which the library passes over. Reading takes members apart here: the
library's decoders run what a member's name asks for, pickles among it.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np

from amed_engine.datasets.formats.format import Format
from amed_engine.datasets.formats.npz import read_head
from amed_engine.datasets.formats.pictures import MAX_RATIO, decoded, encoded
from amed_engine.datasets.formats.shard import Header, Rows, Shard, Writer
from amed_engine.datasets.formats.tar import Member, Tar, members
from amed_engine.datasets.samples import Samples, name
from amed_engine.errors import FileFormatError, require
from amed_engine.solvers.files import MAX_BYTES, parse_json

LIBRARY = "webdataset"
ABOUT = "__about__"


class WebDatasetWriter(Writer):
    def __init__(self, path: Path, header: Header):
        super().__init__(header)
        library = require(LIBRARY, "datasets", "the format webdataset")
        self._file = path.open("wb")
        self._tar = library.TarWriter(self._file, encoder=False, mtime=0)
        self._tar.tarstream = Tar(self._file)

    def _write(self, samples: Samples) -> None:
        labels = [None] * len(samples) if samples.labels is None else samples.labels.tolist()
        pictures = encoded(samples.arrays) if self.header.dtype == "uint8" else map(_npy, samples.arrays)
        kind = _suffix(self.header)
        rows = map(_texts, samples.seeds, labels, samples.hashes())
        for own, texts, data in zip(samples.names, rows, pictures, strict=True):
            self._tar.write({"__key__": own, kind: data, **texts})

    def _finish(self, rows: Rows, text: str) -> None:
        self._tar.tarstream.addfile(tarfile.TarInfo(ABOUT), io.BytesIO(text.encode("ascii")))
        self._tar.close()
        self._file.close()

    def _abandon(self) -> None:
        self._file.close()


def _suffix(header: Header) -> str:
    return "png" if header.dtype == "uint8" else "npy"


def _texts(seed: int, label: int | list[float] | None, sha256: str) -> dict[str, bytes]:
    """The members beside a picture."""
    if label is None or isinstance(label, list):
        known = {} if label is None else {"labels": label}
        return {"json": json.dumps({"seed": seed, **known, "sha256": sha256}).encode()}
    return {"cls": b"%d" % label, "json": b'{"seed": %d, "class": %d, "sha256": "%b"}' % (seed, label, sha256.encode())}


def _npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.lib.format.write_array(data, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return data.getvalue()


class WebDatasetShard(Shard):
    def __init__(self, file: IO[bytes], size: int):
        self._file = file
        self._pictures: list[Member] = []
        rows, text = [], None
        for key, group in groupby(members(file, size), key=lambda member: member.name.partition(".")[0]):
            if text is not None:
                raise FileFormatError(f"{key} stands behind {ABOUT}")
            if key == ABOUT:
                text = self._bytes(*group, most=2 * MAX_BYTES)
            else:
                rows.append(self._row(key, group))
        if text is None:
            raise FileFormatError(f"it has no member {ABOUT}")
        self.header, self.checksum = Header.sealed(text)
        self.rows = Rows.listed(*map(list, zip(*rows, strict=True)))

    def _row(self, key: str, group: Iterable[Member]) -> tuple[int, Any, str]:
        """Seed, label and hash of a sample; where its picture lies is kept."""
        parts = {member.name: member for member in group}
        data = parse_json(self._bytes(parts.pop(f"{key}.json"), most=MAX_BYTES).decode("ascii"))
        if "class" in data and self._bytes(parts.pop(f"{key}.cls"), most=32) != b"%d" % data["class"]:
            raise FileFormatError(f"{key}.cls and {key}.json say two classes")
        (picture,) = parts.values()
        if name(data["seed"]) != key or picture.name not in (f"{key}.png", f"{key}.npy"):
            raise FileFormatError(f"{key} has a member {picture.name}, and is of seed {data['seed']}")
        self._pictures.append(picture)
        return data["seed"], data.get("class", data.get("labels")), data["sha256"]

    def _bytes(self, member: Member, most: int) -> bytes:
        if member.size > most:
            raise FileFormatError(f"{member.name} has {member.size} bytes, more than {most}")
        self._file.seek(member.start)
        return self._file.read(member.size)

    def arrays(self, batch: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self._pictures), batch):
            yield np.stack([self._array(member) for member in self._pictures[start : start + batch]])

    def _array(self, member: Member) -> np.ndarray:
        if not member.name.endswith(_suffix(self.header)):
            raise FileFormatError(f"{member.name} is none of the {self.header.dtype} announced")
        data = self._bytes(member, most=2 * self.header.size + MAX_RATIO)
        if self.header.dtype == "uint8":
            return decoded(data, self.header.shape, member.name)
        stream = io.BytesIO(data)
        if read_head(stream) != (self.header.shape, np.dtype(self.header.dtype)):
            raise FileFormatError(f"{member.name} has another shape or dtype than is announced")
        return np.frombuffer(data, self.header.dtype, offset=stream.tell()).reshape(self.header.shape)


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Shard]:
    with path.open("rb") as file:
        yield WebDatasetShard(file, path.stat().st_size)


WEBDATASET = Format("webdataset", ".tar", WebDatasetWriter, _reader, library=LIBRARY)
