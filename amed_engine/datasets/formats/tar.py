"""Tars of regular files that belong to nobody and to no time: one spelling for one content (POSIX ustar)."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from amed_engine.errors import FileFormatError

BLOCK = 512
RECORD = 20 * BLOCK  # a tar's length is a multiple of it
NAME = 100  # bytes

# Of a header: name, mode, user, group, size, time, sum, kind, target of a link, magic, the rest.
OWNER = b"0000644\0" + b"0000000\0" * 2
TIME = b"%011o\0" % 0
REST = (b"0" + bytes(100) + b"ustar\00000").ljust(BLOCK - 156, b"\0")
CONSTANT = sum(OWNER) + sum(TIME) + sum(REST) + 8 * ord(" ")  # the sum counts itself as blanks


def head(name: str, size: int) -> bytes:
    """The header of a file, as `tarfile` writes it. Raises ValueError for names that are too long or not ASCII."""
    own, length = name.encode("ascii"), b"%011o\0" % size
    if len(own) > NAME or len(length) > 12:
        raise ValueError(f"a tar's member has a name of at most {NAME} characters and less than 8 GiB, got {name}")
    total = b"%06o\0 " % (CONSTANT + sum(own) + sum(length))
    return b"".join((own.ljust(NAME, b"\0"), OWNER, length, TIME, total, REST))


class Tar:
    """The part of a `tarfile.TarFile` that is written to; that one takes six times as long for a header, and keeps them all."""

    def __init__(self, file: IO[bytes]):
        self._file, self._length = file, 0

    def addfile(self, info: tarfile.TarInfo, file: IO[bytes]) -> None:
        data = file.read()
        block = b"".join((head(info.name, len(data)), data, bytes(-len(data) % BLOCK)))
        self._file.write(block)
        self._length += len(block)

    def close(self) -> None:
        end = 2 * BLOCK
        self._file.write(bytes(end + -(self._length + end) % RECORD))


class Member(NamedTuple):
    name: str
    start: int
    size: int


def members(file: IO[bytes], size: int) -> Iterator[Member]:
    """Those of a tar of `size` bytes that `Tar` wrote; between two of them the file may be read anywhere.

    Raises FileFormatError for a header that `head` does not write, and ValueError.
    """
    at = 0
    while True:
        file.seek(at)
        block = file.read(BLOCK)
        if block == bytes(BLOCK):
            return
        found = _member(block, at + BLOCK)
        if found.start + found.size > size:
            raise FileFormatError(f"{found.name} claims {found.size} bytes, more than there are")
        yield found
        at = found.start + found.size + -found.size % BLOCK


def _member(block: bytes, start: int) -> Member:
    name, size = block[:NAME].rstrip(b"\0"), block[124:135]
    if len(block) == BLOCK and name.isascii() and size.isdigit():
        found = Member(name.decode("ascii"), start, int(size, 8))
        if head(found.name, found.size) == block:
            return found
    raise FileFormatError(f"what stands before byte {start} is no header of a file")
