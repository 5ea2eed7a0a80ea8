"""A request's body: read within its limits, parsed as strict JSON."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
from typing import Any

from fastapi import Request

from amed_engine.serving.http.errors import Refusal
from amed_engine.serving.http.limits import Limits
from amed_engine.serving.http.schemas import refusal
from amed_engine.solvers.files import parse_json

DEPTH = 32  # of arrays and objects within each other
LARGEST = 1 << 63  # of whole numbers


async def read(request: Request, limits: Limits) -> bytes:
    """The bytes of a JSON body. Raises Refusal: 408, 413 as soon as there are too many, 415.

    The type is demanded because a page in a browser cannot send it elsewhere without being asked.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "not_json", f"Content-Type must be application/json, got {kind[:80] or 'none'}")
    if (length := request.headers.get("content-length", "")).isdecimal() and int(length) > limits.body:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.seconds):
            return await _within(request, limits)
    except TimeoutError:
        raise Refusal(408, "timeout", f"the body did not arrive within {limits.seconds:g} s; send it at once") from None


async def _within(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.body:
            raise _too_large(limits)
    return bytes(body)


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, "too_large", f"the body has more than the {limits.body} bytes that it may have; send less")


def parse(body: bytes) -> Any:
    """Its JSON: text of Unicode, no name twice, no NaN, no number beyond 64 bits, at most DEPTH levels. Raises Refusal, 400."""
    try:
        data = parse_json(body.decode("utf-8"))
        _check(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "not_json", f"the body is not JSON as it is read here: {error}") from error
    return data


def decoded(param: str, text: str) -> bytes:
    """A file that is the value of a key, in base64. Raises Refusal, 422."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise refusal(param, f"{param} is not base64 in one line: {error}; base64 -w0 writes it so") from error


def _check(data: Any) -> None:
    """Raises ValueError."""
    layer = [data]
    for _ in range(DEPTH + 1):
        for value in layer:
            _check_one(value)
        layer = [inner for value in layer for inner in _inside(value)]
        if not layer:
            return
    raise ValueError(f"more than {DEPTH} levels of arrays and objects")


def _inside(value: Any) -> Any:
    return (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_one(value: Any) -> None:
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is no text
    if isinstance(value, int) and not -LARGEST <= value < LARGEST:
        raise ValueError("a whole number beyond 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number beyond float64")
