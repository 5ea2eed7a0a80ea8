"""What a format is: a way to write shards and to read them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amed_engine.datasets.formats.shard import Header, Shard, Writer
from amed_engine.datasets.samples import Samples
from amed_engine.errors import ConfigError, FileFormatError, MissingDependency, require

REPAIR = "remove it, or pass --check (check=True), and the same command draws it again"


@dataclass(frozen=True)
class Format:
    """suffix: of a shard's name; folder: whether a shard is one; library: the module it needs, None for none; floats: whether
    it holds samples that are no pictures."""

    name: str
    suffix: str
    writer: Callable[[Path, Header], Writer]
    reader: Callable[[Path], AbstractContextManager[Shard]]
    folder: bool = False
    library: str | None = None
    floats: bool = True

    def check(self, shape: tuple[int, ...], dtype: str) -> None:
        """Raise ConfigError unless it holds such samples, MissingDependency without its library."""
        if dtype != "uint8" and not self.floats:
            raise ConfigError(
                f"{self.name} holds pictures of bytes alone, got {dtype} of shape {tuple(shape)}; choose another"
            )
        if self.library:
            require(self.library, "datasets", f"the format {self.name}", "choose png or npz")

    def open(
        self, path: str | os.PathLike, count: int, shape: tuple[int, ...], dtype: str, about: dict[str, Any]
    ) -> Writer:
        """A writer of `count` samples; bytes follow from the arguments and the batches alone. Nothing is flushed to the disk.

        shape, dtype: of a sample; about: JSON. Raises ConfigError, MissingDependency and OSError.
        """
        self.check(shape, dtype)
        return self.writer(Path(path), Header(count, tuple(shape), dtype, about))

    def read(self, path: str | os.PathLike, batch: int) -> Iterator[Samples]:
        """The samples in the order they were written in (png: of their seeds), at most `batch` at a time.

        Raises FileFormatError, which names the file, for anything damaged, and MissingDependency.
        """
        if batch < 1:
            raise ConfigError(f"batch must be at least 1, got {batch}")
        with self._opened(Path(path)) as shard:
            yield from shard.samples(batch)

    def header(self, path: str | os.PathLike) -> Header:
        """What a shard says of itself, checked. Raises as `read` does."""
        with self._opened(Path(path)) as shard:
            return shard.header

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[Shard]:
        if not (path.is_dir() if self.folder else path.is_file()):
            kind = "folder" if self.folder else "file"
            raise FileFormatError(f"{path} is not there or no {kind}; expected a shard of {self.name}")
        if self.library:
            require(self.library, "datasets", f"the format {self.name}")
        try:
            if self.folder:
                _check_regular(path)
            with self.reader(path) as shard:
                shard.check()
                yield shard
        except MissingDependency:
            raise
        except OSError as error:
            raise FileFormatError(f"{path} cannot be read: {error}; {REPAIR}") from error
        except Exception as error:  # libraries raise all kinds of errors for damaged bytes
            said = error if isinstance(error, FileFormatError) else f"{type(error).__name__}, {str(error)[:200]}"
            raise FileFormatError(f"{path} is damaged, or no shard of {self.name}: {said}; {REPAIR}") from error


def _check_regular(folder: Path) -> None:
    """Raise FileFormatError for what is neither file nor folder: opening a FIFO would wait for its writer."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            _check_regular(Path(entry.path))
        elif not entry.is_file(follow_symlinks=False):
            raise FileFormatError(f"{entry.name} is no regular file")
