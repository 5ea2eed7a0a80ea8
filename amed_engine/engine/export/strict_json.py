"""JSON read strictly: every entry known, typed, finite and of a sane size. No torch in sight."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from amed_engine.engine.export.tableau import refuse
from amed_engine.errors import FileFormatError
from amed_engine.solvers.files import parse_json

MAX_BYTES = 32 << 20
MAX_EVALUATIONS = 1000
LARGEST = 1e30  # of a number, so that float32 holds it
MAX_SIZE = 1 << 16  # of a predictor's layers
HASH = "sha256"

Read = TypeVar("Read")


def read_file(path: str | os.PathLike, made: Callable[[Any], Read]) -> Read:
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is not a file; write one with `amed export`")
    if path.stat().st_size > MAX_BYTES:
        raise FileFormatError(f"{path} has {path.stat().st_size} bytes, more than the {MAX_BYTES} it may have")
    try:
        return made(decoded(path.read_text("utf-8")))
    except (UnicodeDecodeError, FileFormatError) as error:
        raise FileFormatError(f"{path}: {error}") from error


def hashed(table: dict[str, Any]) -> dict[str, Any]:
    """A table with its hash as the last entry: SHA-256 of its JSON without the entry and without space between the symbols."""
    return {**table, HASH: _hash_of(table)}


def _hash_of(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def check_hash(data: Any, made: Callable[[Any], Read]) -> Read:
    """What is made of the entries beside the hash. Raises FileFormatError where they are not those it was made of; a table
    without a hash is as good as what it says."""
    if not isinstance(data, dict) or HASH not in data:
        return made(data)
    rest = {name: value for name, value in data.items() if name != HASH}
    found = made(rest)
    if data[HASH] != (own := _hash_of(rest)):
        refuse(
            HASH, data[HASH], f"{own}, that of the other entries: it is damaged, or, if you changed it, delete {HASH}"
        )
    return found


def decoded(text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"it is not valid JSON: {error}; write it again with `amed export`") from error


def expect_names(data: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(data, dict):
        refuse(where, type(data).__name__, "an object")
    if set(data) != set(names):
        missing, unknown = sorted(set(names) - set(data)), sorted(set(data) - set(names))
        refuse(where, f"unknown {_few(unknown)}, missing {_few(missing)}", f"exactly {', '.join(names)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "") if names else "nothing"


def entries(data: Any, where: str, low: int, high: int) -> list:
    if not isinstance(data, list) or not low <= len(data) <= high:
        refuse(
            where, len(data) if isinstance(data, list) else type(data).__name__, f"a list of {low} to {high} entries"
        )
    return data


def number(data: Any, where: str) -> float:
    if not isinstance(data, (int, float)) or isinstance(data, bool) or not abs(data) <= LARGEST:
        refuse(where, str(data)[:40], f"a number up to {LARGEST:g}")
    return float(data)


def numbers(data: Any, where: str, low: int, high: int) -> tuple[float, ...]:
    return tuple(number(value, where) for value in entries(data, where, low, high))


def noise_levels(data: Any, where: str, low: int, high: int) -> tuple[float, ...]:
    levels = numbers(data, where, low, high)
    if not all(level >= 1 / LARGEST for level in levels):
        refuse(where, list(levels), "positive noise levels")
    return levels


def whole(data: Any, where: str, low: int) -> int:
    value = number(data, where)
    if not value.is_integer() or not low <= value <= MAX_SIZE:
        refuse(where, str(data)[:40], f"a whole number from {low} to {MAX_SIZE}")
    return int(value)


def wholes(data: Any, where: str, low: int, high: int, *, least: int = 1) -> tuple[int, ...]:
    return tuple(whole(value, where, least) for value in entries(data, where, low, high))


def flag(data: Any, where: str) -> bool:
    if not isinstance(data, bool):
        refuse(where, str(data)[:40], "true or false")
    return data


def short_text(data: Any, where: str) -> str:
    if not isinstance(data, str) or len(data) > 1000:
        refuse(where, type(data).__name__, "text of at most 1000 characters")
    return data
