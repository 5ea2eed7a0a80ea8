"""The hash in a file of a graph: its last 64 characters are the SHA-256 of everything before them.

In an archive (.pt2) they end its comment, in an ONNX model the last entry of its metadata, so that readers of either format
pass over them. They tell damage, and no forgery: whoever writes a file can write its hash. An archive also has a member,
extra/amed.sha256, with the hash of what the others hold, for when another program packs them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TypeVar

from amed_engine.errors import FileFormatError
from amed_engine.solvers.targets import check_source, resolved
from amed_engine.solvers.temporary import Temporary

MARK = "amed.sha256"
_SEAL = re.compile(rb"amed\.sha256.{1,4}?((?:[0-9a-f]{64}  [^\n\0]+\n)*)([0-9a-f]{64})\Z", re.DOTALL)
_UNKNOWN = b"0" * 64
_TAIL, _PIECE = 1 << 16, 1 << 20  # bytes
_SECONDS, _PAUSE = 1.0, 0.01  # how long a file that is being replaced is read again, and how often
# At the other end of an ONNX model, so that one which lost its hash is known for it.
NOTE = f"{MARK}: the last 64 characters of this file are the SHA-256 of everything before them"
Read = TypeVar("Read")
_REMEDY = (
    "it is damaged, or another program changed it: fetch or write it again, or, where the change was meant, call "
    "amed_engine.adapters.seal(path)"
)


def seal(path: str | os.PathLike, parts: Iterable[str | os.PathLike] = ()) -> None:
    """Record the hash of a .pt2 or .onnx file that was changed on purpose in it, in place of the earlier one.

    parts: files in the same folder that belong to an ONNX model, its weights; unless said those of the earlier hash. The file
    is replaced whole. Raises FileFormatError for another kind of file, OSError.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx") or not path.is_file():
        raise FileFormatError(f"{path} is no .pt2 or .onnx file, which alone have a place for a hash")
    beside = [path.parent / Path(part).name for part in parts]
    with Temporary(resolved(path)) as copy:
        shutil.copyfile(path, copy.path)
        write_seal(copy.path, beside, path)
        copy.flush()
        copy.publish()


def write_seal(path: Path, parts: Iterable[Path] = (), known: Path | None = None) -> None:
    """`seal` in place, for a file that is being written. known: what errors call it."""
    known = known or path
    (_make_room_in_archive if known.suffix == ".pt2" else _make_room_in_model)(path, list(parts), known)
    with open(path, "r+b") as file:
        size = file.seek(-len(_UNKNOWN), os.SEEK_END)
        told = _digest(file, size)
        file.seek(size)
        file.write(told.encode())


class _MixedError(FileFormatError):
    """Files that do not belong together, or not yet."""


def read_sealed(path: str | os.PathLike, read: Callable[[], Read], verify: bool = True) -> Read:
    """What `read` gives of a file, which is the same at its end as when it was checked: where it was replaced meanwhile it is
    read again, for a second and once at least. verify: check it. Raises FileFormatError.
    """
    check_source(path)
    path, end = Path(path), None
    while True:
        before = _stamps(path)
        try:
            if verify:
                check_seal(path)
            made = read()
            if _stamps(path) == before:
                return made
            raise _MixedError(f"{path} was written again and again while it was read; read it when that is over")
        except FileFormatError as error:
            stays = _stamps(path) == before and not isinstance(error, _MixedError)
            if stays or (end is not None and time.monotonic() >= end):
                raise
            end = end or time.monotonic() + _SECONDS
            time.sleep(_PAUSE)


def _stamps(path: Path) -> list[tuple[int, ...]]:
    """What tells a file, and those beside it that belong to it, from others of their names."""
    found = []
    with contextlib.suppress(OSError):
        with open(path, "rb") as file:
            seal = _seal_of(file)
        for part in (path, *(path.parent / name for name in (_parts(seal) if seal else ()))):
            stat = part.stat()
            found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return found


def check_seal(path: str | os.PathLike) -> None:
    """Raise FileFormatError, naming the file, where it is not what its hash says; a file without a hash passes.

    To be called before a runtime sees the file. The whole file is read, in pieces; what is no file is left to the runtime.
    """
    path = Path(path)
    if not path.is_file():
        return
    try:
        with open(path, "rb") as file:
            found = _seal_of(file)
            _check_unsealed(file, path) if found is None else _check_sealed(file, found, path)
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror}") from error


def _check_sealed(file: IO[bytes], found: re.Match[bytes], path: Path) -> None:
    _compare(_digest(file, file.seek(0, os.SEEK_END) - len(_UNKNOWN)), found[2].decode(), path)
    for name, told in _parts(found).items():
        _check_part(path.parent / name, told, path)


def _check_part(part: Path, told: str, path: Path) -> None:
    if part.parent != path.parent or not part.is_file():
        raise _MixedError(f"{path} needs {part.name[:100]!r} beside it, which is not there; keep the two together")
    _compare(_digest_of(part), told, part, _MixedError)


def _check_unsealed(file: IO[bytes], path: Path) -> None:
    """A file whose end is no seal has none, or it was damaged, or its archive packed again."""
    if not _has_mark(file):
        return _check_directory(file, path)
    try:
        with zipfile.ZipFile(file) as archive:
            told = [archive.read(info) for info in archive.infolist() if _is_mark(info) and info.file_size == 64]
            file.seek(-22, os.SEEK_END)  # where the end of an archive begins that has no comment
            if len(told) == 1 and file.read(4) == b"PK\5\6":
                return _compare(_digest_of_members(archive), told[0].decode("ascii", "replace"), path)
    except FileFormatError:
        raise
    except Exception as error:  # zipfile raises what its decompressors happen to raise
        raise FileFormatError(f"{path}: its hash is not where it was written; {_REMEDY}") from error
    raise FileFormatError(f"{path}: its hash is not where it was written; {_REMEDY}")


def _check_directory(file: IO[bytes], path: Path) -> None:
    """An archive that was cut off has lost its directory, and its hash with it."""
    file.seek(0)
    if file.read(4) == b"PK\3\4" and not zipfile.is_zipfile(file):
        raise FileFormatError(f"{path} is a damaged archive; it was cut off, fetch or write it again")


def _compare(found: str, told: str, path: Path, kind: type[FileFormatError] = FileFormatError) -> None:
    if found != told:
        raise kind(f"{path} is not the file that was written: its SHA-256 is {found}, expected {told}; {_REMEDY}")


# ---- hashes ----


def _seal_of(file: IO[bytes]) -> re.Match[bytes] | None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    return _SEAL.search(file.read())


def _parts(found: re.Match[bytes]) -> dict[str, str]:
    """Name -> hash of the files beside."""
    return {line[66:]: line[:64] for line in found[1].decode(errors="replace").splitlines()}


def _has_mark(file: IO[bytes]) -> bool:
    """Whether the mark is anywhere in a file."""
    file.seek(0)
    before, mark = b"", MARK.encode()
    while piece := file.read(_PIECE):
        if mark in before + piece:
            return True
        before = piece[-len(mark) :]
    return False


def _digest(file: IO[bytes], size: int | None = None) -> str:
    """Of the first `size` bytes, or of all."""
    digest, left = hashlib.sha256(), size
    file.seek(0)
    while piece := file.read(_PIECE if left is None else min(left, _PIECE)):
        digest.update(piece)
        left = None if left is None else left - len(piece)
    return digest.hexdigest()


def _digest_of_members(archive: zipfile.ZipFile) -> str:
    """Of names and contents, whatever their order; extra files, which are notes, left out."""
    digest = hashlib.sha256()
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        if "/extra/" in info.filename:
            continue
        digest.update(f"{info.filename}\n{info.file_size}\n".encode())
        with archive.open(info) as member:
            while piece := member.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


# ---- where they lie ----


def _is_mark(info: zipfile.ZipInfo) -> bool:
    return info.filename.endswith(f"/extra/{MARK}")


def _make_room_in_archive(path: Path, parts: list[Path], known: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            folder, marked = archive.namelist()[0].split("/")[0], any(map(_is_mark, archive.infolist()))
            told = _digest_of_members(archive)
    except Exception as error:  # as above
        raise FileFormatError(f"{known} is no readable .pt2 archive: {error}") from error
    with zipfile.ZipFile(path, "a") as archive:
        if not marked:
            archive.writestr(zipfile.ZipInfo(f"{folder}/extra/{MARK}"), told)
        archive.comment = MARK.encode() + b" " + _UNKNOWN


def _make_room_in_model(path: Path, parts: list[Path], known: Path) -> None:
    """One more entry of the metadata, which in protobuf may simply follow the rest."""
    with open(path, "r+b") as file:
        if (earlier := _seal_of(file)) is not None:
            parts = parts or [known.parent / name for name in _parts(earlier)]
            file.truncate(file.seek(0, os.SEEK_END) - len(_entry(earlier[1] + earlier[2])))
        told = "".join(f"{_digest_of(part)}  {part.name}\n" for part in sorted(parts))
        file.seek(0, os.SEEK_END)
        file.write(_entry(told.encode() + _UNKNOWN))


def _digest_of(part: Path) -> str:
    with open(part, "rb") as file:
        return _digest(file)


def _entry(value: bytes) -> bytes:
    """Of an ONNX model's metadata."""
    return _field(14, _field(1, MARK.encode()) + _field(2, value))


def _field(number: int, value: bytes) -> bytes:
    """A field of bytes in protobuf's encoding."""
    size, length = len(value), []
    while size >= 128:
        length.append(size % 128 + 128)
        size //= 128
    return bytes([number << 3 | 2, *length, size]) + value
