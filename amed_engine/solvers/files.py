"""Files of recipes, and how every package above handles its own: written whole or not at all, JSON that says a thing once."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from amed_engine.errors import FileFormatError
from amed_engine.solvers.targets import check_target, is_stream, resolved, stream
from amed_engine.solvers.temporary import Temporary, sync

MAX_BYTES = 8 << 20  # of a file of settings, a mean answer among them

Read = TypeVar("Read")


def atomic_write(path: str | os.PathLike, data: bytes) -> None:
    """Write the whole file or nothing: a temporary file beside it, flushed to disk, then renamed over it.

    The mode is what the umask says. Links are followed and stay; of several hard links this one gets the new content. Raises
    ConfigError for what is no regular file, and OSError as the operating system gives it.
    """
    with Temporary(resolved(path)) as temporary:
        temporary.path.write_bytes(data)
        temporary.flush()
        temporary.publish()


def write_or_stream(path: str | os.PathLike, data: bytes) -> None:
    """`atomic_write`, of a single file that a caller named; to a device or a FIFO the bytes are streamed. Raises ConfigError
    for a FIFO that nobody reads."""
    (stream if is_stream(path) else atomic_write)(path, data)


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A name like `path` in a temporary folder beside it, to write to; at the end all that was written there is renamed to
    beside `path`, the file of its name last. Raises ConfigError where a name there is of no regular file, and OSError."""
    check_target(path)
    path, target = Path(path), resolved(path)
    with Temporary(target, folder=True) as made:
        yield made.path / path.name
        made.flush()
        parts = sorted(made.path.iterdir(), key=lambda part: part.name == path.name)
        places = [target if part.name == path.name else resolved(target.parent / part.name) for part in parts]
        for part, place in zip(parts, places, strict=True):
            os.replace(part, place)
        sync(target.parent)


def write_json(path: str | os.PathLike, data: Any, streams: bool = False) -> None:
    """streams: as `write_or_stream`. Raises ValueError for NaN and infinities, TypeError for what JSON does not have."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    (write_or_stream if streams else atomic_write)(path, text.encode())


def read_json(path: str | os.PathLike, made: Callable[[Any], Read], what: str, remedy: str) -> Read:
    """What `made` makes of a small file, which is to hold `what`. Raises FileFormatError, naming the file, also for a
    ValueError of `made`."""
    path = Path(path)
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise FileFormatError(f"{path} is no file of at most {MAX_BYTES} bytes; {remedy}")
        text = path.read_text("utf-8")
    except OSError as error:  # no permission, or a name that is none
        raise FileFormatError(f"{str(path)[:100]} cannot be read: {error.strerror}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is no text; {remedy}") from error
    try:
        return made(parse_json(text))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} holds no {what}: {error}") from error


def parse_json(text: str) -> Any:
    """Without NaN, infinities and names given twice. Raises ValueError or RecursionError."""
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("an object names an entry twice")
    return data
