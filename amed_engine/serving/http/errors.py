"""Every error in one shape, that of OpenAI: {"error": {"message", "type", "code", "param"}}."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, NamedTuple

from amed_engine.errors import (
    AmedError,
    ConfigError,
    DeadlineError,
    EngineClosedError,
    FileFormatError,
    NonFiniteError,
    QueueFullError,
)
from amed_engine.serving.http.replies import JSON
from amed_engine.serving.statuses import retry_after, status_of

ENDING = "this server is ending, and did not draw what was asked for; ask another one, or again later"
CALLER, SERVER, RATE = "invalid_request_error", "server_error", "rate_limit_error"
# The first that an error is an instance of: type, code.
KINDS: tuple[tuple[type[Exception], str, str], ...] = (
    (QueueFullError, RATE, "queue_full"),
    (EngineClosedError, SERVER, "draining"),
    (DeadlineError, SERVER, "deadline"),
    (NonFiniteError, SERVER, "non_finite"),
    (ConfigError, CALLER, "invalid_value"),
    (FileFormatError, CALLER, "invalid_program"),
)


class Refusal(AmedError):
    """A request that is refused before it reaches an engine. param: the key that is at fault."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class Told(NamedTuple):
    """An error as a client is told it."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]

    def response(self) -> JSON:
        return JSON(self.body, self.status, self.headers)


def told(error: Exception) -> Told:
    """Errors that are not raised on purpose say nothing of the server's inside."""
    if isinstance(error, Refusal):
        kind = CALLER if error.status < 500 else SERVER
        return _told(error.status, kind, error.code, str(error), error.param)
    for cls, kind, code in KINDS:
        if isinstance(error, cls):
            message = ENDING if cls is EngineClosedError else str(error)
            return _told(status_of(error), kind, code, message, None, _retry(error))
    return _told(500, SERVER, "internal", "the server failed on this request; its log says how")


def of_status(status: int, headers: dict[str, str] | None = None) -> Told:
    """Of a status that the router answers: no such path, no such method."""
    phrase = HTTPStatus(status).phrase
    message = f"{phrase.lower()}; GET /v1/models, POST /v1/images/generations and POST /v1/samples are here"
    return _told(status, CALLER, phrase.lower().replace(" ", "_"), message, None, headers)


def _told(
    status: int, kind: str, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> Told:
    return Told(status, {"error": {"message": message, "type": kind, "code": code, "param": param}}, headers or {})


def _retry(error: Exception) -> dict[str, str]:
    if isinstance(error, QueueFullError):
        return {"Retry-After": retry_after(error)}
    return {"Retry-After": "1"} if isinstance(error, EngineClosedError) else {}
