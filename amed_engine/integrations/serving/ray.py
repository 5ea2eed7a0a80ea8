"""Ray Serve: `serve run amed_engine.integrations.serving.ray:build model=digits nfe=5`.

The same requests and answers as the LitServe example.
"""

from typing import Any

from torch import Tensor

from amed_engine.engine.images import check_pictures
from amed_engine.engine.sampler import Sampler
from amed_engine.errors import AmedError, ConfigError, require
from amed_engine.integrations.serving.batching import answer, as_json, from_json

serve = require("ray.serve", "ray")


@serve.deployment
class AMEDDeployment:
    """One Sampler per replica; requests that arrive together are drawn as one batch. options: of Sampler."""

    def __init__(self, **options: Any):
        self.sampler = Sampler(**options)
        check_pictures(self.sampler.model.shape)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def draw(self, payloads: list[Any]) -> list[Tensor | AmedError]:
        return answer(self.sampler, payloads)

    async def __call__(self, request: Any) -> Any:
        drawn = await self.draw(from_json(await request.body()))
        if isinstance(drawn, Tensor):
            return as_json(drawn)
        return require("starlette.responses", "ray").JSONResponse({"error": str(drawn)}, status_code=422)


def build(args: dict[str, str]) -> Any:
    """The application for `serve run`: args are the Sampler's model, predictor, nfe and device."""
    if unknown := sorted(args.keys() - {"model", "predictor", "nfe", "device"}):
        raise ConfigError(f"unknown arguments {', '.join(unknown)}; known are model, predictor, nfe, device")
    options: dict[str, Any] = {"model": "digits", **args}
    if "nfe" in options:
        options["nfe"] = int(options["nfe"])
    return AMEDDeployment.bind(**options)
