"""What the servers share: one engine, into which requests come one by one and from which each gets its own answer."""

from __future__ import annotations

import asyncio
import base64
import inspect
import os
import signal
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amed_engine.engine.images import png, to_uint8
from amed_engine.engine.pairing import NO_PREDICTOR, open_plan, open_predictor
from amed_engine.engine.result import SampleResult
from amed_engine.errors import (
    AmedError,
    ConfigError,
    EngineClosedError,
    QueueFullError,
    require,
)
from amed_engine.integrations.serving.requests import Asked
from amed_engine.serving.engine import ContinuousSampler
from amed_engine.serving.statuses import retry_after, status_of
from amed_engine.serving.threads import handed_over

PROGRAM = ("nfe", "solver", "predictor", "plan", "solver_options", "schedule", "rho", "afs")
THREADS = 4  # that prepare programs and write pictures, so that no request waits for another's
SECONDS = 20.0  # that those which were taken have at the end


class Hosted:
    """An engine as a server holds it, one per replica or device.

    options: of `ContinuousSampler`, rows and queue among them, and of PROGRAM, as of `Sampler`: what draws a request that names
    no solver. One that names another NFE leaves the predictor, plan or noise levels that are for this one. Raises ConfigError,
    FileFormatError.
    """

    def __init__(self, model: Any = "digits", **options: Any):
        check_options(options)
        self.program = _opened({name: options[name] for name in PROGRAM if options.get(name) is not None})
        self.engine = ContinuousSampler(model, **{name: options[name] for name in options.keys() - set(PROGRAM)})
        self._threads = ThreadPoolExecutor(THREADS, "amed-requests")
        self.nfe = self._cost()
        if self.engine.device.type == "cuda":
            self.engine.warmup()

    def submit(self, payload: Any) -> Future[SampleResult]:
        """What a request asks for; may take a second where its program is new. Raises ConfigError, QueueFullError,
        DeadlineError, EngineClosedError."""
        model = self.engine.model
        asked = Asked.parse(payload, model.label_dim, model.continuous)
        return self.engine.submit(asked.seeds, asked.classes, **self._options(asked.options))

    def later(self, work: Any, *args: Any) -> Future:
        """Work in a thread of the server's own. Raises EngineClosedError."""
        try:
            return self._threads.submit(work, *args)
        except RuntimeError as error:
            raise EngineClosedError("the engine is closed and takes no more requests; ask another server") from error

    async def draw(self, payload: Any) -> Tensor:
        """The images (n, C, H, W). Cancelled, it frees the rows. Raises what `submit` and its future raise."""
        future = await handed_over(partial(self.submit, payload), lambda work: asyncio.wrap_future(self.later(work)))
        return (await asyncio.wrap_future(future)).images

    async def pictures(self, payload: Any) -> dict[str, list[str]]:
        """{"images": [PNG as base64, ...]}; see `draw`."""
        return await asyncio.wrap_future(self.later(as_json, await self.draw(payload)))

    def close(self) -> None:
        """Take no more, and end once what was taken is done, or after SECONDS."""
        self.engine.close(drain=True, timeout=SECONDS)
        self._threads.shutdown(wait=True)

    def _options(self, said: dict[str, Any]) -> dict[str, Any]:
        nfe = said.get("nfe", self.nfe)
        if "solver" in said:
            return {**said, "nfe": nfe}
        if nfe == self.nfe:
            return {**said, **self.program, "nfe": self.program.get("nfe")}
        return {**{name: value for name, value in self.program.items() if not _fixes_nfe(name, value)}, **said}

    def _cost(self) -> int:
        """Evaluations of a request that names none, whose program is ready then."""
        model = self.engine.model
        labels = torch.zeros(1, model.label_dim) if model.continuous else None
        return self.engine.cost([0], labels, **self.program).evaluations


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for what `Hosted` does not know, where its engine is not made yet."""
    known = [*inspect.signature(ContinuousSampler).parameters, *PROGRAM]
    if unknown := sorted(options.keys() - set(known)):
        raise ConfigError(f"unknown options {', '.join(unknown)}; known are {', '.join(known)}")


def interrupt_at_sigterm() -> None:
    """SIGTERM does to this process what Ctrl-C does, and nothing to a child that inherits this."""
    own = os.getpid()

    def interrupt(*_: Any) -> None:
        if os.getpid() == own:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def as_json(images: Tensor) -> dict[str, list[str]]:
    """{"images": [PNG as base64, ...]}; raises ConfigError for what is no picture."""
    return {"images": [base64.b64encode(png(picture)).decode("ascii") for picture in to_uint8(images)]}


def refusal(error: AmedError, extra: str) -> Any:
    """The answer {"error": ...}; how long to wait is in its Retry-After. extra: of this package, that brings starlette."""
    waits = {"Retry-After": retry_after(error)} if isinstance(error, QueueFullError) else None
    answer = require("starlette.responses", extra).JSONResponse
    return answer({"error": str(error)}, status_code=status_of(error), headers=waits)


def _opened(program: dict[str, Any]) -> dict[str, Any]:
    """With files read, once."""
    if "plan" in program:
        program["plan"] = open_plan(program["plan"])
    if program.get("predictor", NO_PREDICTOR) != NO_PREDICTOR:
        program["predictor"] = open_predictor(program["predictor"])
    return program


def _fixes_nfe(name: str, value: Any) -> bool:
    return name == "plan" or (name == "predictor" and value != NO_PREDICTOR) or isinstance(value, Tensor)
