"""What a request to a server may say, read strictly: {"seeds": [0, 1], "class_labels": 3, "nfe": 5, ...}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from amed_engine.engine.seeds import check_seeds
from amed_engine.errors import ConfigError
from amed_engine.solvers.arguments import is_finite, is_whole

MAX_IMAGES = 64  # per request
MAX_NFE = 64  # evaluations per image
MAX_PRIORITY = 1 << 31
OPTIONS = ("nfe", "solver", "guidance_scale", "deadline", "priority")


class Asked(NamedTuple):
    """An image per seed, a class, or numbers, for each where the model has labels, and those of OPTIONS that were said."""

    seeds: list[int]
    classes: list[Any] | None
    options: dict[str, Any]

    @classmethod
    def parse(cls, payload: Any, label_dim: int, continuous: bool = False) -> Asked:
        """From an object with "seeds", and perhaps "class_labels" and OPTIONS; null is as good as left out.

        One class serves all seeds. continuous: labels are label_dim numbers per seed, [0.3, 0.7] where label_dim is 1, rows of
        them otherwise. Raises ConfigError.
        """
        if not isinstance(payload, Mapping) or "seeds" not in payload:
            raise ConfigError('a request must be {"seeds": [...]}, and may have "class_labels" and ' + _named())
        if unknown := sorted(map(str, payload.keys() - {"seeds", "class_labels", *OPTIONS})):
            raise ConfigError(
                f'unknown key "{unknown[0][:40]}"; a request must be "seeds", "class_labels" and {_named()}'
            )
        seeds = payload["seeds"]
        if not isinstance(seeds, list) or not 1 <= len(seeds) <= MAX_IMAGES:
            raise ConfigError(f"seeds must be a list of 1 to {MAX_IMAGES} integers")
        seeds = check_seeds(seeds)
        read = _numbers if continuous else _classes
        said = {name: payload[name] for name in OPTIONS if payload.get(name) is not None}
        _check(said)
        return cls(seeds, read(payload.get("class_labels"), len(seeds), label_dim), said)


def from_json(body: bytes) -> Any:
    """The request in a body; None, which is no request, of what is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _named() -> str:
    return ", ".join(f'"{name}"' for name in OPTIONS)


def _check(said: Mapping[str, Any]) -> None:
    """The types, and bounds on what a request may cost; the rest is the engine's to say."""
    rules = {
        "nfe": (lambda v: is_whole(v, 1, MAX_NFE), f"an integer from 1 to {MAX_NFE}"),
        "solver": (lambda v: isinstance(v, str), "the name of a solver"),
        "guidance_scale": (is_finite, "a number"),
        "deadline": (lambda v: is_finite(v) and v > 0, "seconds from now, a number above 0"),
        "priority": (
            lambda v: is_whole(v, 1 - MAX_PRIORITY, MAX_PRIORITY - 1),
            "an integer between -2^31 and 2^31, larger first",
        ),
    }
    for name, value in said.items():
        valid, expected = rules[name]
        if not valid(value):
            raise ConfigError(f"{name} must be {expected}, got {repr(value)[:40]}")


def _classes(given: Any, count: int, label_dim: int) -> list[int] | None:
    if given is None:
        return None
    if not label_dim:
        raise ConfigError("class_labels were given, but the model has no classes; leave them out")
    classes = given if isinstance(given, list) else [given] * count
    valid = all(is_whole(k, 0, label_dim - 1) for k in classes)
    if len(classes) != count or not valid:
        raise ConfigError(f"class_labels must be one integer in 0 .. {label_dim - 1}, or {count} of them")
    return classes


def _numbers(given: Any, count: int, width: int) -> list[list[float]]:
    """A row of numbers per seed, from one row for all or one each; where rows have one number, that may stand alone."""
    rows = given if isinstance(given, list) else [given]
    single = width > 1 and not any(isinstance(row, list) for row in rows)
    rows = [rows] if single else [row if isinstance(row, list) else [row] for row in rows]
    rows = rows * count if len(rows) == 1 else rows
    valid = all(len(row) == width and all(map(is_finite, row)) for row in rows)
    if len(rows) != count or not valid:
        each = "one number" if width == 1 else f"a list of {width} numbers"
        raise ConfigError(f"class_labels must be {each} that the model is told, or {count} of them, one per seed")
    return rows
