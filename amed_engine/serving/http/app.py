"""The application: what is common to all endpoints, and what becomes of errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from types import NoneType
from urllib.parse import unquote_plus

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from amed_engine.errors import AmedError, ConfigError
from amed_engine.serving.engine import ContinuousSampler
from amed_engine.serving.http.endpoints import add_endpoints
from amed_engine.serving.http.errors import Refusal, of_status, told
from amed_engine.serving.http.limits import Limits
from amed_engine.serving.http.service import Service
from amed_engine.solvers.arguments import told as told_of


def make_app(
    engines: Mapping[str, Sequence[ContinuousSampler]], *, limits: Limits | None = None, allow_programs: bool = False
) -> FastAPI:
    """The server as an ASGI application.

    engines: of each model, by the name it is served by, one or several; a request goes to the one with the fewest samples. They
        are warmed up when the application starts, and stay the caller's to close.
    allow_programs: take predictors, recipes and noise levels from requests.
    `app.state.service` has `draining` to set before the end, and `drain`. Raises ConfigError.
    """
    if not isinstance(limits, (Limits, NoneType)):
        raise ConfigError(f"limits must be Limits(...) or None, got {told_of(limits)}")
    if not isinstance(allow_programs, bool):
        raise ConfigError(f"allow_programs must be True or False, got {told_of(allow_programs)}")
    service = Service(engines, Limits() if limits is None else limits, allow_programs)
    app = FastAPI(openapi_url=None, lifespan=_lifespan, redirect_slashes=False)
    app.state.service = service
    app.add_middleware(Gate, service=service)
    for error in (AmedError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(error, _answer)
    add_endpoints(app, service)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Warms up beside the first requests, which may then wait for it; `app.state.warming` raises what went wrong."""
    app.state.warming = asyncio.ensure_future(asyncio.to_thread(app.state.service.warm_up))
    yield
    await asyncio.wait({app.state.warming})


class Gate:
    """What every request goes through: none has a query, and those that are being answered are counted."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with self.service.answering():
            refused = _refused(scope["query_string"])
            await (self.app if refused is None else refused)(scope, receive, send)


def _refused(query: bytes) -> Response | None:
    if not query:
        return None
    name = unquote_plus(query.decode("latin-1")).partition("&")[0].partition("=")[0][:80]
    return told(Refusal(422, "unknown_key", f"unknown query parameter {name!r}; there are none", name)).response()


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, HTTPException):
        return of_status(error.status_code, dict(error.headers or {})).response()
    return told(error).response()
