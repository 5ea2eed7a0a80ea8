"""What the servers share: many requests in, one batch through the engine, one answer per request out."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from amed_engine.engine.images import png, to_uint8
from amed_engine.engine.sampler import Sampler
from amed_engine.engine.seeds import check_seeds
from amed_engine.errors import AmedError, ConfigError, NonFiniteError

MAX_IMAGES = 64  # per request


class Order(NamedTuple):
    """What one request asks for: an image per seed, and a class, or numbers, for each where the model has labels."""

    seeds: list[int]
    classes: list[Any] | None

    @classmethod
    def parse(cls, payload: Any, label_dim: int, continuous: bool = False) -> Order:
        """From {"seeds": [0, 1], "class_labels": [3, 4]}; one class serves all seeds. continuous: labels are label_dim numbers
        per seed, [0.3, 0.7] where label_dim is 1, rows of them otherwise. Raises ConfigError."""
        if (
            not isinstance(payload, Mapping)
            or not payload.keys() <= {"seeds", "class_labels"}
            or "seeds" not in payload
        ):
            raise ConfigError('a request must be {"seeds": [...]} or {"seeds": [...], "class_labels": [...]}')
        seeds = payload["seeds"]
        if not isinstance(seeds, list) or not 1 <= len(seeds) <= MAX_IMAGES:
            raise ConfigError(f"seeds must be a list of 1 to {MAX_IMAGES} integers")
        seeds = check_seeds(seeds)
        read = _numbers if continuous else _classes
        return cls(seeds, read(payload.get("class_labels"), len(seeds), label_dim))


def _classes(given: Any, count: int, label_dim: int) -> list[int] | None:
    if given is None:
        return None
    if not label_dim:
        raise ConfigError("class_labels were given, but the model has no classes; leave them out")
    classes = given if isinstance(given, list) else [given] * count
    valid = all(isinstance(k, int) and not isinstance(k, bool) and 0 <= k < label_dim for k in classes)
    if len(classes) != count or not valid:
        raise ConfigError(f"class_labels must be one integer in 0 .. {label_dim - 1}, or {count} of them")
    return classes


def _numbers(given: Any, count: int, width: int) -> list[list[float]]:
    """A row of numbers per seed, from one row for all or one each; where rows have one number, that may stand alone."""
    rows = given if isinstance(given, list) else [given]
    single = width > 1 and not any(isinstance(row, list) for row in rows)
    rows = [rows] if single else [row if isinstance(row, list) else [row] for row in rows]
    rows = rows * count if len(rows) == 1 else rows
    valid = all(len(row) == width and all(map(_is_number, row)) for row in rows)
    if len(rows) != count or not valid:
        each = "one number" if width == 1 else f"a list of {width} numbers"
        raise ConfigError(f"class_labels must be {each} that the model is told, or {count} of them, one per seed")
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def answer(sampler: Sampler, payloads: Sequence[Any]) -> list[Tensor | AmedError]:
    """The images (seeds, C, H, W) of each request, or what is wrong with it; a bad request spoils no other.

    Requests with classes go through the engine as one batch, those without as another. The same seed and class give the
    same image, whoever else is served.
    """
    answers: list[Any] = [_parsed(payload, sampler) for payload in payloads]
    for with_classes in (True, False):
        rows = [i for i, a in enumerate(answers) if isinstance(a, Order) and (a.classes is not None) is with_classes]
        if rows:
            for i, images in zip(rows, _draw(sampler, [answers[i] for i in rows]), strict=True):
                answers[i] = images
    return answers


def _parsed(payload: Any, sampler: Sampler) -> Order | ConfigError:
    try:
        return Order.parse(payload, sampler.model.label_dim, sampler.model.continuous)
    except ConfigError as error:
        return error


def _draw(sampler: Sampler, orders: Sequence[Order]) -> Sequence[Tensor | AmedError]:
    seeds = [seed for order in orders for seed in order.seeds]
    classes = None if orders[0].classes is None else [k for order in orders for k in order.classes or ()]
    try:
        return sampler.run(seeds, class_labels=classes).images.split([len(order.seeds) for order in orders])
    except NonFiniteError as error:
        return [error] if len(orders) == 1 else [drawn for order in orders for drawn in _draw(sampler, [order])]


def from_json(body: bytes) -> Any:
    """The request in a body; None, which is no request, of what is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def as_json(images: Tensor) -> dict[str, list[str]]:
    """{"images": [PNG as base64, ...]}; raises ConfigError for what is no picture."""
    return {"images": [base64.b64encode(png(picture)).decode("ascii") for picture in to_uint8(images)]}
