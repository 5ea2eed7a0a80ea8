"""Files and folders that appear under their name whole or not at all, and what killed writers leave of them.

A writer works on a temporary name beside its target, `.amed-tmp.SYSTEM-RANDOM.NAME`, holds a lock on it (flock) and renames it
at the end. SYSTEM is the running system's boot id: on its own system a lock that can be taken says that the writer is gone.
Another system's lock may not be seen from here (network file systems), so its files count as left only after STALE seconds
without a write or a `beat`, by the file server's clock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

PREFIX = ".amed-tmp."
STALE = 600.0  # seconds without a sign of life
LONGEST = 200  # characters of the target's name in a temporary one, of the 255 a name may have
UNLINKABLE = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of file systems without hard links
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)


def _system() -> str:
    """Eight characters that no other machine, and no other start of this one, has."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return f"{zlib.crc32(os.uname().nodename.encode()):08x}"


SYSTEM = _system()


class Temporary:
    """A file, or a folder, under a temporary name beside `target`, locked by this process.

    Write to `.path`; then `flush()` and `publish()`. As a context it is discarded unless it was published. Raises OSError,
    which names the target where the operating system names nothing.
    """

    def __init__(self, target: str | os.PathLike, folder: bool = False):
        self.target, self.folder = Path(target), folder
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = None
        while self._lock is None:  # a sweep may come between making and locking it
            self.path = self.target.parent / f"{PREFIX}{SYSTEM}-{secrets.token_hex(4)}.{_short(self.target.name)}"
            self._lock = self._made()

    def _made(self) -> int | None:
        if self.folder:
            self.path.mkdir()
            try:
                handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                return None
        else:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)  # the umask takes its part
        try:
            lock(handle, wait=True)
            if is_there(self.path, handle):
                return handle
        except BaseException:
            remove(self.path)
            os.close(handle)
            raise
        os.close(handle)
        return None

    def beat(self) -> None:
        """A sign of life, for writers that pause for minutes."""
        os.utime(self.path)

    def is_at(self, path: Path) -> bool:
        """Whether what is locked here is the file of that name."""
        return self._lock is not None and is_there(path, self._lock)

    def flush(self) -> None:
        """Have all of it on the disk."""
        for path in (self.path, *self.path.rglob("*")) if self.folder else (self.path,):
            sync(path)

    def publish(self) -> None:
        """Give it its name, in place of a file that has it. An existing folder has to be empty."""
        os.replace(self.path, self.target)
        self._release()
        sync(self.target.parent)

    def claim(self) -> None:
        """Give a file its name where nothing has it, and stay locked. Raises FileExistsError."""
        try:
            os.link(self.path, self.target)
        except OSError as error:
            if error.errno not in UNLINKABLE:
                raise
            if os.path.lexists(self.target):  # of two at once both may come through here
                raise FileExistsError(errno.EEXIST, "File exists", str(self.target)) from error
            os.rename(self.path, self.target)
        self.path.unlink(missing_ok=True)
        sync(self.target.parent)

    def discard(self) -> None:
        if self._lock is not None:
            try:
                remove(self.path)
            finally:
                self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Temporary:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.discard()
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(self.target)) from error


def sweep(folder: str | os.PathLike, name: str | None = None) -> list[Path]:
    """Remove what killed writers left in a folder, of one target's name or of all; what was removed.

    Only temporary names of this package, and only those that no living writer holds.
    """
    found = []
    for path in sorted(Path(folder).glob(f"{PREFIX}*")):
        owner, _, target = path.name.removeprefix(PREFIX).partition(".")
        if name in (None, target) or (name is not None and _short(name) == target):
            with abandoned(path, owner.partition("-")[0]) as left:
                if left:
                    remove(path)
                    found.append(path)
    return found


@contextlib.contextmanager
def abandoned(path: Path, system: str) -> Iterator[bool]:
    """Whether the writer of a locked file or folder is gone; if so it is held here meanwhile, so that one alone may take it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # published or removed just now, or not ours to read
        yield False
        return
    try:
        locked = lock(handle)
        yield locked is not False and is_there(path, handle) and ((locked and system == SYSTEM) or _silent(path))
    finally:
        os.close(handle)


def lock(handle: int, wait: bool = False, shared: bool = False) -> bool | None:
    """Whether a lock was taken, an exclusive one unless `shared`; None where the file system has none."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None
    return True


def is_there(path: Path, handle: int) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False


def _silent(path: Path) -> bool:
    """Whether there was no sign of life for STALE seconds, by the clock of the file server."""
    with contextlib.suppress(OSError):  # a folder that cannot be written keeps its time, and nothing in it goes silent
        os.utime(path.parent)
    return path.parent.stat().st_mtime - path.stat().st_mtime > STALE


def sync(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing where it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _short(name: str) -> str:
    return name[-LONGEST:]
