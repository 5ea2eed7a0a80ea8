"""What a shard says beside its pixels, in every format: a header, a row per sample, and a checksum over both.

    header     JSON: number, shape and dtype of the samples, kind of their labels, and `about`, what the job says of itself
    row        seed, label and SHA-256 of the sample's bytes
    checksum   SHA-256 of the header and of all rows

A reader checks the rows before it hands out a sample and each sample against its row, so nothing of a damaged shard is
taken for something else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import numpy as np

from amed_engine.datasets.samples import DTYPES, LARGEST_SEED, Samples
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.solvers.files import MAX_BYTES, parse_json

VERSION = 1
MAX_SAMPLE = 256 << 20  # bytes of one sample, and of what a reader holds at once
MAX_AXES = 8
CLASS = "class"  # labels: a class, or so many numbers, or None

Labels = str | int | None


@dataclass(frozen=True)
class Header:
    """count: samples; shape, dtype: of one; labels: "class", how many numbers each has, or None; about: JSON of the job."""

    count: int
    shape: tuple[int, ...]
    dtype: str
    about: dict[str, Any]
    labels: Labels = None

    def check(self) -> Header:
        """Itself. Raises ConfigError for what no shard holds."""
        if not (_whole(self.count, 1) and 1 <= len(self.shape) <= MAX_AXES and all(_whole(n, 1) for n in self.shape)):
            raise ConfigError(f"a shard holds samples of 1 to {MAX_AXES} axes, got {self.count} of shape {self.shape}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"samples are stored as {', '.join(DTYPES)}, got {self.dtype}")
        if self.dtype == "uint8" and (len(self.shape) != 3 or self.shape[2] not in (1, 3)):
            raise ConfigError(f"pictures are (H, W, 1 or 3) bytes, got shape {self.shape}; store floats instead")
        if self.size > MAX_SAMPLE:
            raise ConfigError(
                f"a sample of shape {self.shape} has {self.size} bytes, more than the {MAX_SAMPLE} it may have"
            )
        if not (self.labels is None or self.labels == CLASS or _whole(self.labels, 1)):
            raise ConfigError(f"labels are None, {CLASS!r} or how many numbers each has, got {self.labels!r}")
        if not isinstance(self.about, dict) or len(self.text()) > MAX_BYTES:
            raise ConfigError(f"about must be an object of at most {MAX_BYTES} bytes of JSON")
        return self

    @property
    def size(self) -> int:
        """Bytes of one sample."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def row_size(self) -> int:
        """Bytes of the label and the digest of one sample."""
        return 32 + (0 if self.labels is None else 8 if self.labels == CLASS else 4 * int(self.labels))

    def at_once(self, batch: int) -> int:
        """How many samples of a batch a reader may hold, at least one."""
        return max(1, min(batch, MAX_SAMPLE // (4 * self.size)))

    def text(self, **more: str) -> str:
        """Its JSON, one spelling for one content. Raises ConfigError."""
        try:
            data = {"version": VERSION, **asdict(self), **more}
            return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"about cannot be written as JSON: {error}") from error

    @classmethod
    def parse(cls, text: bytes) -> Header:
        """The header of its JSON. Raises ValueError, which does not name the file."""
        return cls.sealed(text, seal=False)[0]

    @classmethod
    def sealed(cls, text: bytes, seal: bool = True) -> tuple[Header, str]:
        """The header and the checksum of a shard's JSON. Raises ValueError, which does not name the file."""
        if len(text) > 2 * MAX_BYTES:
            raise FileFormatError(f"its description has {len(text)} bytes, more than {2 * MAX_BYTES}")
        data = parse_json(text.decode("ascii"))
        names = {"version", "count", "shape", "dtype", "about", "labels", *(["checksum"] if seal else [])}
        if not isinstance(data, dict) or set(data) != names or data.pop("version") != VERSION:
            raise FileFormatError(f"its description is none of version {VERSION}, with {', '.join(sorted(names))}")
        checksum = data.pop("checksum", "")
        if not isinstance(data["shape"], list) or not isinstance(checksum, str):
            raise FileFormatError("its description says no shape or no checksum")
        return cls(**{**data, "shape": tuple(data["shape"])}).check(), checksum


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Rows:
    """seeds (N,) int64, labels as `Samples` has them, digests (N, 32) uint8."""

    seeds: np.ndarray
    labels: np.ndarray | None
    digests: np.ndarray

    @classmethod
    def of(cls, samples: Samples) -> Rows:
        return cls(np.array(samples.seeds, np.int64), samples.labels, samples.digests)

    @classmethod
    def listed(cls, seeds: list[int], labels: list, hashes: list[str]) -> Rows:
        """Of what texts say, one entry a sample. Raises ValueError."""
        digests = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, 32)
        return cls(np.array(seeds, np.int64), _listed(labels), digests)

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            np.concatenate([part.seeds for part in parts]),
            np.concatenate(labels) if labels else None,
            np.concatenate([part.digests for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, part: slice | np.ndarray) -> Rows:
        return Rows(self.seeds[part], None if self.labels is None else self.labels[part], self.digests[part])

    def kind(self) -> Labels:
        """What labels these are, as a header says it."""
        return None if self.labels is None else CLASS if self.labels.ndim == 1 else self.labels.shape[1]

    def checksum(self, header: Header) -> str:
        """SHA-256 of the header's JSON, then of every row: seed and label little-endian, digest."""
        found = hashlib.sha256(header.text().encode())
        columns = [self.seeds.astype("<i8", copy=False), self.digests]
        if self.labels is not None:
            columns.insert(1, self.labels.astype(self.labels.dtype.newbyteorder("<"), copy=False))
        for start in range(0, len(self), 4096):
            parts = [np.ascontiguousarray(column[start : start + 4096]) for column in columns]
            found.update(np.concatenate([part.view(np.uint8).reshape(len(part), -1) for part in parts], axis=1).data)
        return found.hexdigest()


def _listed(labels: list) -> np.ndarray | None:
    kinds = {type(label) for label in labels}
    if kinds <= {type(None)}:
        return None
    if kinds not in ({int}, {list}):
        raise FileFormatError("its labels are of several kinds")
    return np.array(labels, np.int64 if kinds == {int} else np.float32)


class Writer:
    """Of one shard: `add` batch after batch, then `close`; or `abort`, which leaves a part. Memory is bounded by a batch and
    the rows, of some fifty bytes each. Raises ConfigError for samples that are not as announced, OSError as it comes."""

    def __init__(self, header: Header):
        self.header = header.check()
        self._rows: list[Rows] = []
        self._added = 0

    def add(self, samples: Samples) -> None:
        rows = Rows.of(samples)
        if not self._added:
            self.header = replace(self.header, labels=rows.kind()).check()
            self._start()
        self._expect(samples, rows)
        self._added += len(samples)
        self._rows.append(rows)
        self._write(samples)

    def _expect(self, samples: Samples, rows: Rows) -> None:
        header, got = self.header, (samples.arrays.shape[1:], str(samples.arrays.dtype), rows.kind())
        if got != (header.shape, header.dtype, header.labels):
            raise ConfigError(
                f"shape, dtype and labels of a shard's samples are {header.shape}, {header.dtype} and {header.labels}; got "
                f"{got[0]}, {got[1]} and {got[2]}"
            )
        if self._added + len(samples) > header.count:
            raise ConfigError(f"the shard was to hold {header.count} samples, got {self._added + len(samples)}")

    def close(self) -> None:
        if self._added != self.header.count:
            raise ConfigError(f"the shard was to hold {self.header.count} samples, got {self._added}")
        rows = Rows.join(self._rows)
        self._finish(rows, self.header.text(checksum=rows.checksum(self.header)))

    def abort(self) -> None:
        """Close what is open; the part written stays. Raises nothing: what is left to write may find the disk full again."""
        with contextlib.suppress(OSError):
            self._abandon()

    def _abandon(self) -> None:
        """Close files."""

    def _start(self) -> None:
        """The first batch is coming, the kind of labels is known."""

    def _write(self, samples: Samples) -> None:
        raise NotImplementedError

    def _finish(self, rows: Rows, text: str) -> None:
        """text: the header's JSON with the checksum."""
        raise NotImplementedError


class Shard:
    """One that is read: `header` and `checksum`, `rows`, and the samples as a stream."""

    header: Header
    checksum: str
    rows: Rows

    def arrays(self, batch: int) -> Iterator[np.ndarray]:
        """Of all rows in order, at most `batch` at a time."""
        raise NotImplementedError

    def bounded(self, size: int) -> None:
        """Refuse a header that more bytes would be needed for than the file has."""
        if self.header.count * self.header.row_size > size:
            raise FileFormatError(
                f"it claims {self.header.count} samples of shape {self.header.shape}, more than its {size} bytes can hold"
            )

    def check(self) -> None:
        rows, header = self.rows, self.header
        if rows.seeds.dtype != np.int64 or rows.seeds.ndim != 1 or rows.digests.shape != (len(rows), 32):
            raise FileFormatError(
                f"its seeds are {rows.seeds.dtype} {rows.seeds.shape}, its hashes {rows.digests.shape}"
            )
        if len(rows) != header.count or rows.kind() != header.labels or rows.checksum(header) != self.checksum:
            raise FileFormatError("its seeds, labels, hashes or description are not those that were written")
        if len(rows) and not (rows.seeds.min() >= 0 and rows.seeds.max() <= LARGEST_SEED):
            raise FileFormatError(f"its seeds are outside 0 .. {LARGEST_SEED}")

    def samples(self, batch: int) -> Iterator[Samples]:
        """Each compared with its row."""
        start = 0
        for arrays in self.arrays(self.header.at_once(batch)):
            rows = self.rows[start : start + len(arrays)]
            found = Samples(rows.seeds.tolist(), arrays, rows.labels)
            if arrays.shape[1:] != self.header.shape or str(arrays.dtype) != self.header.dtype:
                raise FileFormatError(
                    f"it has samples of {arrays.dtype} {arrays.shape[1:]}, announced {self.header.shape}"
                )
            if (bad := (found.digests != rows.digests).any(axis=1)).any():
                raise FileFormatError(f"the sample of seed {rows.seeds[bad][0]} is not the one that was written")
            start += len(arrays)
            yield found
        if start != len(self.rows):
            raise FileFormatError(f"it ends after {start} of {len(self.rows)} samples")
