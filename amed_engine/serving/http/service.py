"""What the endpoints share: engines by the names of their models, limits, and whether the server is coming or going."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from amed_engine.errors import ConfigError, EngineClosedError
from amed_engine.serving.engine import ContinuousSampler
from amed_engine.serving.http.errors import Refusal
from amed_engine.serving.http.limits import Limits


class Service:
    """engines: of each model at least one, which stay the caller's to close."""

    def __init__(
        self, engines: Mapping[str, Sequence[ContinuousSampler]], limits: Limits, allow_programs: bool = False
    ):
        _check(engines)
        self.engines = {name: list(own) for name, own in engines.items()}
        self.limits, self.allow_programs = limits, allow_programs
        self.warm, self.draining, self.started = False, False, int(time.time())
        self._open, self._idle = 0, asyncio.Event()

    def __iter__(self) -> Iterator[tuple[str, str, ContinuousSampler]]:
        """(model, device, engine) of all; devices that two engines of a model share are numbered."""
        for name, engines in self.engines.items():
            devices = [str(engine.device) for engine in engines]
            for number, (device, engine) in enumerate(zip(devices, engines, strict=True)):
                yield name, device if devices.count(device) == 1 else f"{device}/{number}", engine

    @property
    def ready(self) -> bool:
        return self.warm and not self.draining and not any(engine.closed for _, _, engine in self)

    def warm_up(self) -> None:
        """Capture what is to be captured, on every engine. Blocks."""
        for _, _, engine in self:
            engine.warmup()
        self.warm = True

    def engine(self, name: str | None) -> tuple[str, ContinuousSampler]:
        """The name of a model and the engine of it with the fewest samples. Raises Refusal, 404, and EngineClosedError."""
        if self.draining:
            raise EngineClosedError("the server is going away and takes no more requests; ask another one")
        if name is None and len(self.engines) > 1:
            raise Refusal(422, "invalid_value", f"model is missing; served are {', '.join(self.engines)}", "model")
        name = next(iter(self.engines)) if name is None else name
        self.check_name(name)
        return name, min(self.engines[name], key=lambda engine: (engine.closed, _load(engine)))

    def check_name(self, name: str) -> None:
        """Raises Refusal, 404."""
        if name not in self.engines:
            message = f"no model {name[:80]!r}; served are {', '.join(self.engines)}"
            raise Refusal(404, "model_not_found", message, "model")

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Round the work on a request, its answer included."""
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def drain(self, grace: float, hurry: asyncio.Event) -> int:
        """Take no more work and wait, at most `grace` seconds or until hurry is set, until all requests are answered; how many
        are not."""
        self.draining = True
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, hurry)]
        if self._open:
            await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return self._open


def _check(engines: Any) -> None:
    """Raises ConfigError."""
    named = isinstance(engines, Mapping) and engines and all(isinstance(name, str) and name for name in engines)
    if not named or not all(map(_are_engines, engines.values())):
        raise ConfigError(f"every model needs an engine, got {engines!r}; pass {{name: [ContinuousSampler(...)]}}")


def _are_engines(own: Any) -> bool:
    return isinstance(own, Sequence) and len(own) > 0 and all(hasattr(each, "closed") for each in own)


def _load(engine: ContinuousSampler) -> int:
    stats = engine.stats()
    return stats.live + stats.waiting
