"""Who draws which shard: a file `claims/000003.json` for each that is being drawn.

It appears locked and whole, by a link, and goes with its shard's end. A claim whose writer lives is never taken; one that was
left is. Nothing but double work hangs on claims: shards are the same bytes whoever draws them.
"""

from __future__ import annotations

import contextlib
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
    """The claims of a dataset's folder.

    run: a name for claims of one run whose shards come to one writer at a time; a claim that carries it is an earlier, dead
    writer's, on whatever machine.
    """

    def __init__(self, folder: Path, run: str | None = None):
        self.folder, self.run = folder / FOLDER, run

    def take(self, shard: int) -> Claim | None:
        """The claim of a shard, or None where another draws it."""
        path = self.folder / f"{shard:06d}.json"
        if path.exists() and not _removed(path, self.run):
            return None
        temporary = None
        while temporary is None:
            with contextlib.suppress(FileNotFoundError):  # another tidied the folder away just now
                temporary = Temporary(path)
        try:
            said = {"system": SYSTEM, "host": socket.gethostname(), "pid": os.getpid(), "run": self.run}
            temporary.path.write_text(json.dumps(said))
            temporary.claim()
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
            if path.stem.isdecimal() and not _removed(path, self.run) and path.exists():
                found[int(path.stem)] = f"process {said.get('pid', '?')} on {said.get('host', '?')}"
        return found

    def tidy(self) -> None:
        """Remove what killed writers left, and the folder where nothing is in it."""
        if self.folder.is_dir():
            self.held()
            sweep(self.folder)
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def _removed(path: Path, run: str | None = None) -> bool:
    """Whether a claim had been left, or is of this run, and is gone now."""
    said = _said(path)
    with abandoned(path, str(said.get("system"))) as left:
        if gone := left or (run is not None and said.get("run") == run):
            path.unlink(missing_ok=True)
        return gone


def _said(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text()[:1000])
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
