"""HTTP round `ContinuousSampler`: an application for any ASGI server, and uvicorn with it as `amed serve` runs it."""

from amed_engine.errors import require

for _module in ("fastapi", "uvicorn", "prometheus_client"):
    require(_module, "serve", "the HTTP server")

from amed_engine.serving.http.app import make_app  # noqa: E402  (what is missing is named first)
from amed_engine.serving.http.limits import Limits  # noqa: E402

__all__ = ["Limits", "make_app"]
