"""A folder of PNG files, 000042.png the one of seed 42, and about.json for all of them.

Each file says in text chunks what it is: seed, class, sha256 of its pixels, the plan in short, and the SHA-256 of the shard's
description.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from amed_engine.datasets.formats.format import Format
from amed_engine.datasets.formats.pictures import decoded, encoded, text_chunks, texts_of
from amed_engine.datasets.formats.shard import Header, Rows, Shard, Writer
from amed_engine.datasets.samples import Samples, name
from amed_engine.errors import FileFormatError
from amed_engine.solvers.files import MAX_BYTES, parse_json

ABOUT = "about.json"
HEAD = 64 << 10  # bytes of a file read for its texts
LONGEST = 1000  # characters of a plan in a picture


class PngWriter(Writer):
    def __init__(self, path: Path, header: Header):
        super().__init__(header)
        path.mkdir(exist_ok=True)
        self._folder = path

    def _start(self) -> None:
        plan = _short(self.header.about.get("plan"))
        self._common = text_chunks({**plan, "about": _digest(self.header)})

    def _write(self, samples: Samples) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            files = encoded(samples.arrays, list(self._texts(samples)))
            for own, data in zip(samples.names, files, strict=True):
                _put(folder, f"{own}.png", data)
        finally:
            os.close(folder)

    def _texts(self, samples: Samples) -> Iterator[bytes]:
        labels = [None] * len(samples) if samples.labels is None else samples.labels.tolist()
        for seed, label, sha256 in zip(samples.seeds, labels, samples.hashes(), strict=True):
            told = {} if label is None else {"class": json.dumps(label)}
            yield text_chunks({"seed": str(seed), **told, "sha256": sha256}) + self._common

    def _finish(self, rows: Rows, text: str) -> None:
        order = np.argsort(rows.seeds, kind="stable")
        text = self.header.text(checksum=rows[order].checksum(self.header))
        (self._folder / ABOUT).write_text(text, "ascii")


def _put(folder: int, name: str, data: bytes) -> None:
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
    finally:
        os.close(handle)


def _digest(header: Header) -> str:
    return hashlib.sha256(header.text().encode()).hexdigest()


def _short(plan: Any) -> dict[str, str]:
    """A plan as a text, by its hash where it is long; none where the job has no plan."""
    if plan is None:
        return {}
    text = plan if isinstance(plan, str) and plan.isascii() else json.dumps(plan, sort_keys=True)
    return {"plan": text if len(text) <= LONGEST else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"}


class PngShard(Shard):
    def __init__(self, path: Path):
        with (path / ABOUT).open("rb") as file:
            self.header, self.checksum = Header.sealed(file.read(2 * MAX_BYTES + 1))
        if self.header.dtype != "uint8":
            raise FileFormatError(f"{ABOUT} says samples of {self.header.dtype}")
        self._description = _digest(self.header)
        self._files = sorted(path.glob("*.png"), key=lambda file: (len(file.name), file.name))
        others = sorted(set(os.listdir(path)) - {ABOUT, *(file.name for file in self._files)})
        if len(self._files) != self.header.count or others:
            raise FileFormatError(
                f"it has {len(self._files)} pictures of {self.header.count}, and {others[:3] or 'no others'}"
            )
        self.rows = Rows.listed(*map(list, zip(*map(self._row, self._files), strict=True)))

    def _row(self, file: Path) -> tuple[int, Any, str]:
        """Seed, label and hash."""
        with file.open("rb") as opened:
            head = opened.read(HEAD)
            if b"IDAT" not in head:  # a long label
                head += opened.read(MAX_BYTES)
        texts = texts_of(head, file.name)
        seed = texts.get("seed", "")
        if not re.fullmatch("[0-9]{1,10}", seed) or file.name != f"{name(int(seed))}.png":
            raise FileFormatError(f"{file.name} says that it is of seed {seed[:20]!r}")
        if texts.get("about") != self._description:
            raise FileFormatError(f"{file.name} was written with another description than {ABOUT}")
        return int(seed), parse_json(texts.get("class", "null")), texts.get("sha256", "")

    def arrays(self, batch: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self._files), batch):
            files = self._files[start : start + batch]
            yield np.stack([decoded(self._bytes(file), self.header.shape, file.name) for file in files])

    def _bytes(self, file: Path) -> bytes:
        if file.stat().st_size > 2 * self.header.size + HEAD + MAX_BYTES:
            raise FileFormatError(f"{file.name} is larger than a picture of shape {self.header.shape}")
        return file.read_bytes()


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Shard]:
    yield PngShard(path)


PNG = Format("png", "", PngWriter, _reader, folder=True, floats=False)
