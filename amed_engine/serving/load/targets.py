"""What a load is offered to: an engine of this process, or a server by its URL."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple, Protocol

from amed_engine.errors import AmedError, ConfigError, DeadlineError, EngineClosedError, QueueFullError, require
from amed_engine.serving.load.arrivals import Arrival
from amed_engine.serving.load.loop import Refused

REFUSALS = (429, 503, 504)  # HTTP: the queue is full, the server stops, a deadline cannot be met
COUNTERS = ("amed_evaluations_total", "amed_evaluated_total")  # of /metrics


class Rows(NamedTuple):
    """Since the start of a target: evaluations that were asked for, and rows that the network computed for them."""

    evaluations: int
    evaluated: int


class Target(Protocol):
    """Asked by `offer`; `name` says what it is."""

    name: str

    async def ask(self, arrival: Arrival) -> None:
        """Return once all of the samples are there. Raises Refused, or AmedError where it failed."""
        ...

    async def rows(self) -> Rows | None:
        """None where the target does not count them."""
        ...


class EngineTarget:
    """A `ContinuousSampler`. options: of its `submit`, the same for every request."""

    def __init__(self, engine: Any, **options: Any):
        self.engine, self.options = engine, options
        self.name = f"{engine.model.name or 'an engine'} in this process"

    async def ask(self, arrival: Arrival) -> None:
        try:
            future = self.engine.submit(list(arrival.seeds), nfe=arrival.nfe, **self.options)
            await asyncio.wrap_future(future)
        except (QueueFullError, DeadlineError, EngineClosedError) as error:
            raise Refused(type(error).__name__) from error

    async def rows(self) -> Rows:
        stats = self.engine.stats()
        return Rows(stats.evaluations, stats.evaluated)


class ServerTarget:
    """`amed serve` at a URL, within `async with`. options: of `POST /v1/samples`, the same for every request; None left out."""

    def __init__(self, url: str, *, transport: Any = None, **options: Any):
        self._http = require("httpx2", "serve", "asking a server")
        self.url = self._checked(url)
        self.options = {name: value for name, value in options.items() if value is not None}
        self.name, self._transport = self.url, transport

    def _checked(self, url: str) -> str:
        try:
            parsed = self._http.URL(url)
        except self._http.InvalidURL as error:
            raise ConfigError(f"{url!r} is not a URL ({error}); write one like http://127.0.0.1:8000") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{url!r} is not the URL of a server; write one like http://127.0.0.1:8000")
        return url.rstrip("/")

    async def __aenter__(self) -> ServerTarget:
        # As many connections as requests are on their way, and no clock but the caller's: neither may hold one back.
        limits = self._http.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = self._http.AsyncClient(base_url=self.url, limits=limits, timeout=None, transport=self._transport)
        try:
            await self._client.get("/healthz", timeout=10.0)
        except self._http.HTTPError as error:
            await self._client.aclose()
            raise AmedError(f"no server answers at {self.url} ({_said(error)}); start one with amed serve") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, arrival: Arrival) -> None:
        body = {**self.options, "seeds": list(arrival.seeds), "nfe": arrival.nfe, "format": "png"}
        try:
            response = await self._client.post("/v1/samples", json=body)
        except self._http.HTTPError as error:
            raise AmedError(_said(error)) from error
        if response.status_code in REFUSALS:
            raise Refused(f"status {response.status_code}")
        if response.status_code != 200:
            raise AmedError(f"status {response.status_code}: {_message(response)}")
        if (drawn := _samples(response)) != len(arrival.seeds):
            raise AmedError(f"{drawn} samples in the answer, {len(arrival.seeds)} were asked for")

    async def rows(self) -> Rows | None:
        try:
            response = await self._client.get("/metrics")
        except self._http.HTTPError as error:
            raise AmedError(f"/metrics of {self.url}: {_said(error)}") from error
        return _rows(response.text) if response.status_code == 200 else None


def _samples(response: Any) -> int:
    """How many samples are in an answer: one of a picture, or JSON with a list of them."""
    if response.headers.get("content-type", "").startswith("image/"):
        return 1
    try:
        return len(response.json()["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise AmedError(f"an answer that is not one of amed serve: {response.text[:200]}") from error


def _message(response: Any) -> str:
    """What the server says is wrong; the body of one that says it in another shape."""
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _rows(text: str) -> Rows | None:
    """The sums over all engines of Prometheus' text format; None where it has not both counters."""
    parser = require("prometheus_client.parser", "serve", "reading /metrics")
    samples = [sample for family in parser.text_string_to_metric_families(text) for sample in family.samples]
    if not {sample.name for sample in samples} >= set(COUNTERS):
        return None
    return Rows(*(round(sum(sample.value for sample in samples if sample.name == name)) for name in COUNTERS))


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
