"""Plain data as pickles hold it, and the bounds that make whatever is done with it later cost no more than the file is long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from amed_engine.errors import FileFormatError

MAX_DEPTH = 200
MAX_REPEATS = 16  # how often a walk may come by one thing, and how many times larger than the file its tensors may be
MAX_NAME = 1024  # characters of a key, or of a class's or a module's name
MAX_BITS = 1024  # of an integer; torch's magic number has 77
PLAIN = (str, bytes, int, float, type(None))
MAX_PARTS = 8  # of a tuple that is a key, each of them plain


class Ref(NamedTuple):
    """The name of a class or function. Never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """What stands for an object: the name of its class and the state that was saved of it."""

    kind: str
    state: Any = None


class Refused(Exception):
    """Why; `run` adds where."""


def check_key(key: Any) -> Any:
    """Keys are hashed and compared, which a nested tuple could make endless, and long text or a large number slow."""
    parts = key if isinstance(key, tuple) and 0 < len(key) <= MAX_PARTS else (key,)
    if not all(isinstance(part, PLAIN) for part in parts):
        raise Refused(f"it has {show(key)} for a key")
    if any(isinstance(part, (str, bytes)) and len(part) > MAX_NAME for part in parts):
        raise Refused(f"it has a key of more than {MAX_NAME} characters")
    # Numbers of 64 bits have as many hashes as there are of them; of longer ones any count can share one.
    if any(isinstance(part, int) and part.bit_length() > 64 for part in parts):
        raise Refused("it has a number of more than 64 bits for a key")
    return key


def check_literal(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise Refused(f"it has an integer of {value.bit_length()} bits")
    return value


def show(value: Any) -> str:
    return repr(str(value)[:200]) if isinstance(value, (Ref, str)) else f"a {type(value).__name__}"


def check_depth(value: Any) -> None:
    """Level by level, each thing once, however often it is mentioned: whoever walks the data later may recurse."""
    level, seen = {id(value): value}, {id(value)}
    for _ in range(MAX_DEPTH):
        below = {id(child): child for parent in level.values() for child in _children(parent)}
        level = {key: child for key, child in below.items() if key not in seen}
        seen.update(level)
        if not level:
            return
    raise Refused(f"its data is nested more than {MAX_DEPTH} levels deep")


def _children(value: Any) -> Iterable:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, Record):
        return (value.state,)
    return () if isinstance(value, Ref) or not isinstance(value, (list, tuple)) else value


class Visits:
    """Counts how often a walk comes by each thing. A dictionary of two references to a dictionary of two references ... has few
    entries and no end of places: a walk through it costs MAX_REPEATS times its size, or is refused."""

    def __init__(self):
        self.counts: Counter[int] = Counter()

    def count(self, value: Any, where: str) -> None:
        self.counts[id(value)] += bool(value)  # what is empty costs nothing, and may be one object everywhere
        if self.counts[id(value)] > MAX_REPEATS:
            raise FileFormatError(
                f"{where[:80] or 'the file'} holds one {type(value).__name__} at more than {MAX_REPEATS} places; save what is "
                "needed of it alone"
            )
