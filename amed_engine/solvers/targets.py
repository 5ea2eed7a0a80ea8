"""What a name that is to be written stands for: a file that is made or replaced whole, or a node, which never is replaced.

    nothing yet, a regular file    written whole; of several hard links this one gets the new content, the others keep the old
    a link to one of these         the same, where it leads; the link stays
    a character device, a FIFO     bytes are streamed to it where a single file of bytes was asked for, else it is refused
    a folder, a socket, a block device, a link to itself or into a folder that is not there    refused

Names of open files (/dev/stdout, /proc/self/fd/1) are streamed to as a FIFO is, whatever is behind them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.solvers.temporary import sweep

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFREG: "an open file of a process",
}
STREAMS = (stat.S_IFCHR, stat.S_IFIFO, stat.S_IFREG)
NO_NAME = {
    errno.ELOOP: "is a link that leads back to itself; remove it, or choose another name",
    errno.ENAMETOOLONG: "has a longer name than the file system takes; choose a shorter one",
}
_DESCRIPTORS = re.compile(r"/proc/\d+(/task/\d+)?/fd")
_held: dict[str, int] = {}  # FIFOs that were opened before the work


def resolved(path: str | os.PathLike) -> Path:
    """The regular file that is to be made or replaced: the path itself, or where its links lead. Raises ConfigError for what
    is, or leads to, anything else."""
    if str(path).endswith("/"):
        raise ConfigError(f"{_named(path)} names a folder, expected a file; leave the / out, or choose another name")
    if (node := _node(path)) is not None:
        raise ConfigError(f"{_named(path)} is {KINDS[node]}, expected a file or a new name; choose another name")
    if not os.path.islink(path):
        return Path(path)
    file = Path(os.path.realpath(path))
    if not file.parent.is_dir():
        raise ConfigError(
            f"{_named(path)} is a link to {file}, whose folder does not exist; make it, or remove the link"
        )
    return file


def check_source(path: str | os.PathLike) -> None:
    """Before a file or a folder is read: raise FileFormatError where there is something else. To open a FIFO is to wait for its
    writer, and a device may have no end."""
    kind = stat.S_IFREG  # of what is not there who opens it speaks
    with contextlib.suppress(OSError, ValueError):
        kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise FileFormatError(f"{_named(path)} is {KINDS[kind]}, expected a file; copy what it gives to one")


def is_stream(path: str | os.PathLike) -> bool:
    """Whether bytes for this name are streamed, not written as a file."""
    return _node(path) in STREAMS


def check_target(path: str | os.PathLike, streams: bool = False) -> None:
    """Before the work: whether a file can be made there; and what killed writers of it left beside it is removed.

    streams: a device or a FIFO will do as well. Raises ConfigError for a node that cannot be written, OSError for a folder.
    """
    if streams and is_stream(path):
        return
    file = resolved(path)
    _try(file.parent, file.name)
    _sweep(file.parent, file.name)


def check_folder(path: str | os.PathLike, *names: str) -> None:
    """The same for a folder, and the files of these names in it; what killed writers left in it is removed.

    Raises ConfigError where the folder, or one of the files, is something else; OSError.
    """
    path = Path(path)
    _check_above(path / "file")
    for name in names:
        resolved(path / name)
    _try(path)
    _sweep(path)


def _try(folder: Path, *names: str) -> None:
    """Write to the nearest folder that exists; what is to be made in it has names that it takes."""
    there = next((above for above in (folder, *folder.parents) if os.path.lexists(above)), Path())
    for name in (*folder.relative_to(there).parts, *names):
        _found(there / name)
    with tempfile.TemporaryFile(dir=there):
        pass


def _sweep(folder: Path, name: str | None = None) -> None:
    with contextlib.suppress(PermissionError):  # another user's
        sweep(folder, name)


def _node(path: str | os.PathLike) -> int | None:
    """The kind of a node that is no regular file, a key of KINDS; None for one, and for what does not exist."""
    if (found := _found(path)) is None:
        _check_above(Path(path))
        return None
    kind = stat.S_IFMT(found.st_mode)
    return kind if kind != stat.S_IFREG or is_descriptor(path) else None


def _found(path: str | os.PathLike) -> os.stat_result | None:
    """Of what a name leads to. Raises ConfigError for a name that cannot be one of a file."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ConfigError(f"{str(path)[:100]!r} is no name of a file: {error}; choose another") from error
    except OSError as error:
        if error.errno not in NO_NAME:
            raise
        raise ConfigError(f"{_named(path)} {NO_NAME[error.errno]}") from error


def _check_above(path: Path) -> None:
    """What exists of the folders above a name has to be one; of a regular file there the operating system speaks."""
    above = next((folder for folder in path.parents if os.path.lexists(folder)), Path())
    if (found := _found(above)) is None:
        raise ConfigError(
            f"{above} is a link to {os.path.realpath(above)}, which does not exist; make that folder, or remove the link"
        )
    if (kind := stat.S_IFMT(found.st_mode)) not in (stat.S_IFDIR, stat.S_IFREG):
        raise ConfigError(f"{above} is {KINDS[kind]}, expected a folder or a new name; choose another name")


def is_descriptor(path: str | os.PathLike) -> bool:
    """Whether a name leads through the list of a process's open files."""
    link = os.fspath(path)
    while os.path.islink(link):
        folder = os.path.dirname(link)
        if _DESCRIPTORS.fullmatch(os.path.realpath(folder)):
            return True
        link = os.path.join(folder, os.readlink(link))
    return False


def _named(path: str | os.PathLike) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"


# ---- streams ----


@contextlib.contextmanager
def held(path: str | os.PathLike) -> Iterator[None]:
    """Keep a FIFO open for `stream`: to open it only to look would be the end of file to who reads it. Raises ConfigError
    where nobody does."""
    key = os.path.abspath(path)
    if _node(path) == stat.S_IFIFO:
        _held[key] = _opened(path)
    try:
        yield
    finally:
        if key in _held:
            os.close(_held.pop(key))


def stream(path: str | os.PathLike, data: bytes) -> None:
    """Write bytes to a device or a FIFO. Raises ConfigError for a FIFO that nobody reads, and OSError, naming it."""
    key = os.path.abspath(path)
    handle = _held.pop(key) if key in _held else _opened(path)
    try:
        os.set_blocking(handle, True)
        write_all(handle, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _opened(path: str | os.PathLike) -> int:
    # Without waiting for a reader; to the end of a file that a shell opened for the process's output.
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_APPEND)
    except OSError as error:
        if error.errno != errno.ENXIO or _node(path) != stat.S_IFIFO:
            raise
        raise ConfigError(
            f"{_named(path)} is a FIFO that nobody reads; start its reader first, or name a file"
        ) from error
