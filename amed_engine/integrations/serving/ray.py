"""Ray Serve: `serve run amed_engine.integrations.serving.ray:build model=digits nfe=5`.

The same requests and answers as the LitServe example.
"""

from dataclasses import asdict
from typing import Any

from amed_engine.engine.images import check_pictures
from amed_engine.errors import AmedError, ConfigError, EngineClosedError, require
from amed_engine.integrations.serving.hosted import Hosted, refusal
from amed_engine.integrations.serving.requests import from_json

serve = require("ray.serve", "ray")

ROWS, QUEUE = 64, 1024  # as of ContinuousSampler
_NUMBERS = ("nfe", "rows", "queue")
_TEXTS = ("model", "predictor", "device")


# One more than the engine can hold: which request goes first, or is refused, is the engine's to say and not the router's.
@serve.deployment(max_ongoing_requests=ROWS + QUEUE + 1)
class AMEDDeployment:
    """One engine per replica, into which all its requests come at once. options: of `Hosted`."""

    def __init__(self, **options: Any):
        self.hosted = Hosted(**options)
        check_pictures(self.hosted.engine.model.shape)

    async def __call__(self, request: Any) -> Any:
        try:
            return await self.hosted.pictures(from_json(await request.body()))
        except AmedError as error:
            return refusal(error, "ray")

    def stats(self) -> dict[str, Any]:
        """What the engine did so far; see `ServingStats`."""
        return asdict(self.hosted.engine.stats())

    def check_health(self) -> None:
        """Ray replaces a replica whose engine ended."""
        if self.hosted.engine.closed:
            raise EngineClosedError("the engine of this replica is closed")

    def __del__(self) -> None:
        if "hosted" in vars(self):
            self.hosted.close()


def build(args: dict[str, str]) -> Any:
    """The application for `serve run`: args are model, predictor, nfe, rows, queue and device, as of `Hosted`."""
    if unknown := sorted(args.keys() - {*_TEXTS, *_NUMBERS}):
        raise ConfigError(f"unknown arguments {', '.join(unknown)}; known are {', '.join([*_TEXTS, *_NUMBERS])}")
    options: dict[str, Any] = {name: _whole(name, text) if name in _NUMBERS else text for name, text in args.items()}
    most = options.get("rows", ROWS) + options.get("queue", QUEUE) + 1
    return AMEDDeployment.options(max_ongoing_requests=most).bind(**options)


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} must be an integer, got {text!r}") from None
