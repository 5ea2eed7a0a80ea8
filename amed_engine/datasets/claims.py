"""Who draws which shard: a file `claims/000003.json` for each that is being drawn.

It appears locked and whole, by a link, and goes with its shard's end. A claim whose writer lives is never taken; one that was
left is. Nothing but double work hangs on claims: shards are the same bytes whoever draws them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from amed_engine.solvers.temporary import SYSTEM, Temporary, abandoned, sweep

FOLDER = "claims"
BEAT = 20.0  # seconds between signs of life


class Claim:
    """A shard that this process draws, until `release`."""

    def __init__(self, temporary: Temporary, path: Path):
        self._temporary, self.path = temporary, path
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name=f"claim {path.name}").start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        self._ended.set()
        if self._temporary.is_at(self.path):  # not taken over by others, who saw no sign of life
            self.path.unlink(missing_ok=True)
        self._temporary.discard()  # the lock goes last


class Claims:
    """The claims of a dataset's folder."""

    def __init__(self, folder: Path):
        self.folder = folder / FOLDER

    def take(self, shard: int) -> Claim | None:
        """The claim of a shard, or None where another draws it."""
        path = self.folder / f"{shard:06d}.json"
        if path.exists() and not _removed(path):
            return None
        try:
            temporary = Temporary(path)
        except FileNotFoundError:  # another tidied the folder away just now
            temporary = Temporary(path)
        try:
            temporary.path.write_text(json.dumps({"system": SYSTEM, "host": socket.gethostname(), "pid": os.getpid()}))
            _link(temporary.path, path)
            temporary.path.unlink(missing_ok=True)
        except FileExistsError:
            temporary.discard()
            return None
        except BaseException:
            temporary.discard()
            raise
        return Claim(temporary, path)

    def held(self) -> dict[int, str]:
        """Shards that living writers draw, and who they are; claims that were left are removed."""
        found = {}
        for path in sorted(self.folder.glob("[0-9]*.json")):
            said = _said(path)
            if not _removed(path) and path.exists():
                found[int(path.stem)] = f"process {said.get('pid', '?')} on {said.get('host', '?')}"
        return found

    def tidy(self) -> None:
        """Remove what killed writers left, and the folder where nothing is in it."""
        if self.folder.is_dir():
            self.held()
            sweep(self.folder)
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def _link(made: Path, path: Path) -> None:
    """Give a locked file its name where nothing has it. Raises FileExistsError."""
    try:
        os.link(made, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():  # no links here: two may come through, and draw the same bytes twice
            raise FileExistsError(errno.EEXIST, "claimed", str(path)) from error
        os.rename(made, path)


def _removed(path: Path) -> bool:
    """Whether a claim had been left, and is gone now."""
    with abandoned(path, str(_said(path).get("system"))) as left:
        if left:
            path.unlink(missing_ok=True)
        return left


def _said(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text()[:1000])
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
