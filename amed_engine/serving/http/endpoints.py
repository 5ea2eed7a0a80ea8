"""The endpoints. What may take long, checks of the engine and PNG among it, runs beside the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from amed_engine.engine.result import SampleResult
from amed_engine.serving.http import answers, bodies, orders
from amed_engine.serving.http.errors import Refusal
from amed_engine.serving.http.metrics import registry
from amed_engine.serving.http.replies import JSON
from amed_engine.serving.http.schemas import Draw, Generation, read
from amed_engine.serving.http.service import Service
from amed_engine.serving.http.streams import Events, Stream
from amed_engine.serving.http.waiting import result_of

PNG = "image/png"
WRITERS = {
    "json": answers.pictures,
    "png": answers.picture,
    "npz": answers.npz,
    "safetensors": answers.safetensors_file,
}


def add_endpoints(app: FastAPI, service: Service) -> None:
    here = Endpoints(service)
    app.get("/healthz")(here.healthz)
    app.get("/readyz")(here.readyz)
    app.get("/metrics")(here.metrics)
    app.get("/v1/models")(here.models)
    app.get("/v1/models/{name:path}")(here.model)
    app.post("/v1/images/generations")(here.generations)
    app.post("/v1/samples")(here.samples)


class Drawing(NamedTuple):
    """A request that an engine has."""

    model: str
    form: str  # of the answer: json, png, npz, safetensors or stream
    future: Future[SampleResult]


class Endpoints:
    def __init__(self, service: Service):
        self._service, self._metrics = service, registry(service)

    async def healthz(self) -> Response:
        """Whether the process is alive."""
        return JSON({"status": "alive"})

    async def readyz(self) -> Response:
        """Whether requests may be sent here: warmed up, and not going away."""
        service = self._service
        status = "ready" if service.ready else "draining" if service.draining else "warming up"
        return JSON({"status": status}, 200 if service.ready else 503)

    async def metrics(self) -> Response:
        """Counts of the engines, for Prometheus."""
        text = await asyncio.to_thread(generate_latest, self._metrics)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def models(self) -> Response:
        """The models that are served."""
        return JSON({"object": "list", "data": [self._told(name) for name in self._service.engines]})

    async def model(self, name: str) -> Response:
        """One of them."""
        self._service.check_name(name)
        return JSON(self._told(name))

    def _told(self, name: str) -> dict[str, Any]:
        engines = self._service.engines[name]
        known = engines[0].model
        room = engines[0].conditions
        told = {} if room is None else room.described()
        facts = {"shape": known.shape, "classes": known.classes, "label_dim": known.label_dim, "conditions": told}
        where = {"devices": [str(engine.device) for engine in engines], "rows": sum(engine.rows for engine in engines)}
        where["predictors"] = sorted(known.predictors)
        who = {"object": "model", "created": self._service.started, "owned_by": "amed_engine"}
        return {"id": name, **who, **facts, **where}

    async def generations(self, request: Request) -> Response:
        """Draw pictures, in OpenAI's words."""
        body = await bodies.read(request, self._service.limits)
        drawing = await asyncio.to_thread(self._submit_generation, body)
        result = await result_of(request, drawing.future)
        return await asyncio.to_thread(answers.pictures, result, drawing.model)

    def _submit_generation(self, body: bytes) -> Drawing:
        order = orders.of_generation(read(Generation, bodies.parse(body)), self._service)
        return Drawing(order.model, "json", order.submit())

    async def samples(self, request: Request) -> Response:
        """Draw samples, by all that the engine takes."""
        body = await bodies.read(request, self._service.limits)
        events, alone = Events(), _wants_png(request)
        drawing = await asyncio.to_thread(self._submit_draw, body, events, alone)
        if drawing.form == "stream":
            return Stream(events, drawing.future, drawing.model)
        result = await result_of(request, drawing.future)
        return await asyncio.to_thread(WRITERS[drawing.form], result, drawing.model)

    def _submit_draw(self, body: bytes, events: Events, alone: bool) -> Drawing:
        asked = read(Draw, bodies.parse(body))
        order = orders.of_draw(asked, self._service)
        form = _form(asked, alone, order.samples)
        future = order.submit(events.put if form == "stream" else None)
        if form == "stream":
            future.add_done_callback(events.put)
        return Drawing(order.model, form, future)


def _wants_png(request: Request) -> bool:
    """Whether a picture is asked for, rather than anything or JSON."""
    kinds = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
    return PNG in kinds and "application/json" not in kinds


def _form(asked: Draw, alone: bool, samples: int) -> str:
    """Of the answer, a key of WRITERS or "stream". Raises Refusal, 406."""
    if asked.stream and alone:
        raise Refusal(406, "not_acceptable", f"a stream is no {PNG}; leave stream or Accept: {PNG} out", "stream")
    if asked.stream:
        return "stream"
    if asked.format == "npz" or asked.format == "safetensors":
        return asked.format
    if not alone:
        return "json"
    if samples != 1:
        message = f"{PNG} is one picture, got {samples} samples; leave Accept: {PNG} out for JSON of all"
        param = "seeds" if asked.seeds is not None else "latents" if asked.latents is not None else "n"
        raise Refusal(406, "not_acceptable", message, param)
    return "png"
