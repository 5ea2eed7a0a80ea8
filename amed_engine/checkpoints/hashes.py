"""What a file is known by: SHA-256 of its tensors and of its configuration, named in the configuration itself.

A file that was damaged and still parses is refused, and so is a folder whose files are not of one save. Files that name no
hash are older, or of others, and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from amed_engine.adapters.fingerprint import digest
from amed_engine.errors import FileFormatError

KEY = "amed_sha256"
# Any one of these says that there were hashes, so that damage to the others does not make an older file of it.
TRACE = re.compile(r"amed_sha256|(configuration|tensors)\W+[0-9a-f]{64}")
NOT_OF_ONE_SAVE = (
    "they are not of one save: it was stopped half way, or two wrote at once, or one was changed; save the folder again"
)
SECONDS, PAUSE = 1.0, 0.01  # how long a folder that is being saved is read again, and how often

Loaded = TypeVar("Loaded")


class Hashes(NamedTuple):
    """SHA-256, in hex."""

    configuration: str
    tensors: str


class MixedError(FileFormatError):
    """The files of a folder are not of one save."""


def of_config(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration as JSON, without the hashes that it names. Raises TypeError, ValueError, RecursionError."""
    told = {name: value for name, value in config.items() if name != KEY}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def signed(config: Mapping[str, Any], tensors: str) -> dict[str, Any]:
    """The configuration with its own hash and that of the tensors it is for. Raises TypeError or ValueError."""
    return {**config, KEY: Hashes(of_config(config), tensors)._asdict()}


def named(text: str, file: Path) -> Hashes | None:
    """The hashes that a JSON object's text names, None where it has no trace of any. Raises FileFormatError."""
    if TRACE.search(text) is None:
        return None
    try:
        return Hashes(**{name: _hex(value) for name, value in json.loads(text)[KEY].items()})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"{file}: its entry {KEY!r}, the SHA-256 of configuration and tensors, is damaged; fetch or save it again"
        ) from error


def _hex(value: str) -> str:
    if re.fullmatch("[0-9a-f]{64}", value) is None:
        raise ValueError(value)
    return value


def found_in(config: Mapping[str, Any]) -> str:
    """`of_config` of what a file holds, which may be no JSON in earnest: numbers beyond float64, endless nesting."""
    try:
        return of_config(config)
    except (ValueError, RecursionError):
        return "none"


def check_config(config: Mapping[str, Any], said: Hashes, file: Path) -> None:
    """Raises FileFormatError where the configuration is not the one that was saved."""
    if (found := found_in(config)) != said.configuration:
        raise FileFormatError(
            f"{file}: its configuration was changed since it was saved (SHA-256 {found}, saved was {said.configuration}); "
            "fetch or save it again"
        )


def check_tensors(tensors: Mapping[str, Tensor], said: Hashes, file: Path) -> None:
    """Raises FileFormatError where the tensors are not those that were saved."""
    found = digest(tensors)
    if found != said.tensors:
        raise FileFormatError(
            f"{file}: its tensors were changed since it was saved (SHA-256 {found}, saved was {said.tensors}); "
            "fetch or save it again"
        )


def check_pair(expected: Any, found: str, teller: Path, file: Path, what: str = "tensors") -> None:
    """Raises MixedError where one file of a folder names another's SHA-256, and that is not it."""
    if expected != found:
        raise MixedError(
            f"{teller} is for {what} of SHA-256 {str(expected)[:200]}, but {file} has {found}: {NOT_OF_ONE_SAVE}"
        )


def settled(load: Callable[[], Loaded]) -> Loaded:
    """What `load` gives, asked again for a second, and once at least, where the files of its folder are not of one save."""
    end = None
    while True:
        try:
            return load()
        except MixedError:
            if end is not None and time.monotonic() >= end:
                raise
            end = end or time.monotonic() + SECONDS
            time.sleep(PAUSE)
