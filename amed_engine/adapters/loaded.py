"""The file that a model was read from: its hash, for whoever needs to say which it was."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from amed_engine.errors import ConfigError


@dataclass(frozen=True)
class LoadedFile:
    """A file as it was when it was opened: size, time of its last change and place on the disk."""

    path: Path
    state: tuple[int, int, int]

    @classmethod
    def of(cls, path: str | os.PathLike) -> LoadedFile:
        return cls(Path(path), _state(path))

    def sha256(self) -> str:
        """Of its bytes, read a piece at a time. Raises ConfigError where it is no longer the file that was opened."""
        try:
            with open(self.path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            unchanged = _state(self.path) == self.state
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be read again for its hash: {error.strerror}; load it again"
            ) from error
        if not unchanged:
            raise ConfigError(f"{self.path} has changed since it was loaded, and its hash with it; load it again")
        return found


def _state(path: str | os.PathLike) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino
