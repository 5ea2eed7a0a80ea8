"""What torch.save wrote: archives within their bounds, and read by torch once our own reader has looked at what it would do.

Torch restricted to tensors (`weights_only=True`) runs no code, but it hashes and repeats what it is told to, and takes a
storage to be as large as its pickle says.
"""

from __future__ import annotations

import io
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch

from amed_engine.checkpoints.pickles import Policy, run
from amed_engine.checkpoints.plain_data import MAX_REPEATS, Record, Ref, Refused, check_key, show
from amed_engine.checkpoints.policy import MAGIC, MAX_DIMENSIONS, check_view
from amed_engine.errors import ConfigError, FileFormatError

UNPACKED = 256 << 20  # bytes that the contents of any archive may have; of a larger one, its own size
PIECE = 1 << 20
# What the standard library makes of an archive that is none.
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, LookupError, ValueError, RuntimeError, EOFError, OSError)
ANY = re.compile(r".*", re.DOTALL)
TENSOR_CLASS = re.compile(r"torch\.(\w+\.)*(\w*Tensor|Parameter)")
ITEM_SIZES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "Untyped", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1),
    **dict.fromkeys(("Short", "Half", "BFloat16"), 2),
    **dict.fromkeys(("Int", "Float", "QInt32"), 4),
    **dict.fromkeys(("Long", "Double", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}  # bytes of a number in a storage, by the beginning of its class's name


def check_bound(path: Path, size: int, max_bytes: int | None, what: str = "has") -> None:
    """Raise FileFormatError for a file whose contents have more bytes than the caller allows, ConfigError for no bound."""
    if max_bytes is not None and (not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1):
        raise ConfigError(f"max_bytes must be a positive integer or None, got {max_bytes!r}")
    if max_bytes is not None and size > max_bytes:
        raise FileFormatError(
            f"{path} {what} {size} bytes, more than the {max_bytes} that it may have; if you trust it, allow as many: "
            f"--max-bytes {size}, or max_bytes={size} from Python"
        )


def check_archive(archive: zipfile.ZipFile, path: Path, max_bytes: int | None = None) -> list[zipfile.ZipInfo]:
    """The files in an archive, none of them twice, together not larger than `max_bytes`: unless that says otherwise, UNPACKED
    or the archive itself. Raises FileFormatError."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if len({info.filename.lower() for info in infos}) != len(infos):
        raise FileFormatError(
            f"{path} has two entries of one name, which two readers could take differently; it is damaged"
        )
    usual = max(UNPACKED, _size_of(archive.fp))
    check_bound(path, sum(i.file_size for i in infos), usual if max_bytes is None else max_bytes, "unpacks to")
    return infos


def load_restricted(file: BinaryIO, path: Path, max_bytes: int | None = None) -> Any:
    """The data of an archive of torch.save, or of what it wrote before there were archives, on the CPU. path: for errors.

    Raises FileFormatError, UnsafeFileError for what costs more than its size, and whatever torch raises.
    """
    if file.read(2) == b"PK":
        _look_into_archive(file, path, max_bytes)
    else:
        _look_into_stream(file, path)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _look_into_archive(file: BinaryIO, path: Path, max_bytes: int | None) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            infos = check_archive(archive, path, max_bytes)
            roots = {PurePosixPath(info.filename).parts[0] for info in infos}
            if len(roots) != 1:
                raise FileFormatError(f"{path}: its entries do not share one folder, as torch.save has them")
            root = roots.pop()
            sizes = {i.filename.removeprefix(f"{root}/data/"): i.file_size for i in infos}
            _check_sums(archive, infos)
            data = archive.read(f"{root}/data.pkl")
    except DAMAGED as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path} is a damaged archive: {error}; fetch it again") from error
    run(io.BytesIO(data), _policy(len(data), sum(sizes.values()), sizes), str(path))


def _check_sums(archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo]) -> None:
    """Compare contents with their CRC-32, which torch does not; where all are zero, it was told to write none. Raises what
    zipfile raises."""
    if not any(info.CRC for info in infos):
        for info in infos:
            info.CRC = None  # type: ignore[assignment]  (which zipfile does not compare)
        return
    for info in infos:
        with archive.open(info) as member:
            while member.read(PIECE):
                pass


def _look_into_stream(file: BinaryIO, path: Path) -> None:
    """Five pickles: a number, a version, the system, the data, the keys of the storages that follow."""
    size = _size_of(file)
    with io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else _mapped(file) as data:
        policy = _policy(size, size, None)
        magic, *_, keys = (run(data, policy, str(path)) for _ in range(5))
    if magic != MAGIC or not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise FileFormatError(f"{path} is not what torch.save wrote before there were archives; it is damaged")


def _mapped(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _size_of(file: Any) -> int:
    at = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(at)
    return size


def _policy(pickled: int, held: int, sizes: Mapping[str, int] | None) -> Policy:
    storages = _Storages(held, sizes)
    return Policy(ANY, _Calls(pickled, held), storages, attributes=True)


class _Storages:
    """Persistent ids: what the pickle says of storages, each of which must have the bytes that it claims.

    sizes: of the files in an archive. Without, all of them together are not larger than the file.
    """

    def __init__(self, left: int, sizes: Mapping[str, int] | None):
        self.left, self.sizes, self.known = left, sizes, {}

    def __call__(self, ident: Any) -> Record:
        if not isinstance(ident, tuple) or len(ident) not in (5, 6) or ident[0] not in ("storage", b"storage"):
            raise Refused("a storage in it has another persistent id than torch's")
        _, cls, key, _, count = ident[:5]
        kind = cls.name.removesuffix("Storage") if isinstance(cls, Ref) else None
        if kind not in ITEM_SIZES or not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 60:
            raise Refused("a storage in it is of an unknown type, or of no size")
        for part in ident[5:]:  # the place of a view in it, by a key of its own
            check_key(part if part is None else part[0] if isinstance(part, tuple) and part else ())
        size = count * ITEM_SIZES[kind]
        if self.known.setdefault(check_key(key), size) != size:
            raise Refused(f"storage {show(key)} in it has two sizes")
        self._claim(key, size)
        return Record("storage", (count, ITEM_SIZES[kind]))

    def _claim(self, key: str, size: int) -> None:
        if self.sizes is not None:
            if self.sizes.get(key) != size:
                raise Refused(
                    f"storage {show(key)} in it claims {size} bytes, its entry has {self.sizes.get(key, 'none')}"
                )
        elif sum(self.known.values()) > self.left:
            raise Refused("its storages are larger than itself")


class _Calls(dict):
    """What torch would do for a pickle, counted and not done. Of names that torch does not know it says so itself."""

    def __init__(self, pickled: int, held: int):
        views = {f"torch._utils.{name}": self.view for name in _VIEWS}
        super().__init__({**_COUNTED, **views, "torch._tensor._rebuild_from_type_v2": self.typed})
        self.left, self.bytes = MAX_REPEATS * pickled, MAX_REPEATS * held

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        return partial(self.call, name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]

    def call(self, name: str, *arguments: Any) -> Any:
        self.left -= 1 + sum(len(each) for each in arguments if isinstance(each, (str, bytes, tuple, list, dict, set)))
        if self.left < 0:
            raise Refused("it copies its values again and again")
        if TENSOR_CLASS.fullmatch(name):
            if any(not isinstance(each, (Record, bool)) for each in arguments):
                raise Refused(f"it makes a {show(name)} of a size without numbers")
            return Record(name, ())  # with a state, lest it is given one
        return super().get(name, lambda *_: Record(name))(*arguments)

    def view(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Record:
        if not isinstance(storage, Record) or storage.kind != "storage":
            raise Refused("a tensor in it has no storage")
        held, item = storage.state
        self.bytes -= check_view(held, offset, size, stride) * item
        if self.bytes < 0:
            raise Refused(f"its tensors are more than {MAX_REPEATS} times larger than itself")
        return Record("tensor", ())

    def typed(self, function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
        if not isinstance(function, Ref) or not isinstance(arguments, tuple):
            raise Refused(f"it makes a tensor by {show(function)}")
        return self.call(str(function), *arguments)


def _ordered(pairs: Any = ()) -> dict:
    return {check_key(key): value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs)}


def _set(values: Any = ()) -> set:
    return {check_key(value) for value in values}


def _size(sizes: Any = ()) -> tuple:
    if not isinstance(sizes, (tuple, list)) or len(sizes) > MAX_DIMENSIONS:
        raise Refused("a size in it has too many dimensions")
    return tuple(sizes)


def _bytes(data: Any = b"", *_: Any) -> bytes:
    if not isinstance(data, (str, bytes)):
        raise Refused(f"bytes in it are made of {show(data)}")
    return b""


_VIEWS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
_COUNTED = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _ordered,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "builtins.bytearray": _bytes,
    "__builtin__.bytearray": _bytes,
    "_codecs.encode": _bytes,
    "torch.Size": _size,
}
