"""The append-only list of a dataset's shards, `ledger.jsonl`: a line for each, written just before the shard gets its name.

So whatever has a shard's name is listed; what is listed and not there was about to be written when its writer died, and is
drawn again. A line that a kill cut short is none. Several lines of one shard: the last one counts.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from amed_engine.errors import FileFormatError
from amed_engine.solvers.files import parse_json
from amed_engine.solvers.targets import check_source
from amed_engine.solvers.temporary import lock

NAME = "ledger.jsonl"
SHARD = re.compile(r"shard-([0-9]{6,})(\.[a-z0-9]{1,10})?")
INNER = re.compile(r"(?!\.\.?(/|$))[A-Za-z0-9_.-]+(/(?!\.\.?(/|$))[A-Za-z0-9_.-]+)*")  # no way out of the folder
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One shard: its number and name, samples, SHA-256 of its bytes, `sum` of its samples (see `Samples.sum`), bytes, the
    processor it was drawn on, and, where it is a folder, the size of each file in it."""

    shard: int
    name: str
    samples: int
    sha256: str
    sum: str
    size: int
    device: str
    files: dict[str, int] | None = field(default=None)

    def __post_init__(self) -> None:
        if not (self.files is None or isinstance(self.files, dict)):
            raise ValueError("files must be an object of names and sizes")
        match = SHARD.fullmatch(self.name) if isinstance(self.name, str) else None
        numbers = (self.shard, self.samples, self.size, *(self.files or {}).values())
        if (
            match is None
            or int(match[1]) != self.shard
            or not all(type(number) is int and number >= 0 for number in numbers)
            or not all(isinstance(text, str) and HASH.fullmatch(text) for text in (self.sha256, self.sum))
            or not isinstance(self.device, str)
            or not all(INNER.fullmatch(name) for name in self.files or ())
        ):
            raise ValueError(f"{str(self.name)[:80]!r} is no entry of a shard")

    def is_there(self, folder: Path) -> bool:
        """Whether all of it is in the folder, by its size. A link in its place is not it."""
        path = folder / self.name
        sizes = {path: self.size} if self.files is None else {path / name: size for name, size in self.files.items()}
        if path.is_symlink() or (self.files is not None and not path.is_dir()):
            return False
        return all(_size(file) == size for file, size in sizes.items())


def _size(path: Path) -> int | None:
    """Bytes of a regular file; None for anything else."""
    try:
        return path.lstat().st_size if path.is_file() and not path.is_symlink() else None
    except OSError:
        return None


class Ledger:
    """The ledger of a folder. `entries` are the shards by number as of the last `refresh`, which reads what was added.

    Of one thread; others, and other processes, have their own.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME
        self.entries: dict[int, Entry] = {}
        self._read = 0

    def refresh(self) -> Mapping[int, Entry]:
        """Raises FileFormatError for a whole line that is no entry."""
        if not self.path.exists():
            self.entries, self._read = {}, 0
            return self.entries
        check_source(self.path)
        with open(self.path, "rb") as file:  # opened anew: a network file system shows then what others wrote
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self._take(line)
        return self.entries

    def _take(self, line: bytes) -> None:
        try:
            fields = parse_json(line.decode())
            if fields.pop("crc32", None) != _sum(fields):
                raise ValueError("it is not what was written")
            entry = Entry(**fields)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if _is_cut(line):  # by a kill or a full disk, and ended by the next writer
                return
            raise FileFormatError(
                f"{self.path} holds a line that is no shard: {error}; restore it, or draw into another folder"
            ) from error
        self.entries[entry.shard] = entry

    def append(self, entry: Entry) -> None:
        """On the disk when this returns."""
        fields: dict[str, Any] = {name: value for name, value in asdict(entry).items() if value is not None}
        line = (json.dumps({**fields, "crc32": _sum(fields)}) + "\n").encode()
        with open(self.path, "ab+") as file:
            lock(file.fileno(), wait=True)
            if file.tell() and not _ends_a_line(file.fileno(), file.tell()):
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _sum(fields: Any) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def _is_cut(line: bytes) -> bool:
    """Whether the end of an object is missing; one inside it may be complete."""
    return not line.rstrip().endswith(b"}") or line.count(b"{") > line.count(b"}")


def _ends_a_line(handle: int, size: int) -> bool:
    return os.pread(handle, 1, size - 1) == b"\n"
