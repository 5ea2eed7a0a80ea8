"""LitServe: `python -m amed_engine.integrations.serving.litserve --model digits --nfe 5`.

    curl -s localhost:8000/predict -H 'Content-Type: application/json' -d '{"seeds": [0, 1], "class_labels": 3}'

answers {"images": [PNG as base64, ...]}, or status 422 and {"error": ...}.
"""

from typing import Any

import click
from torch import Tensor

from amed_engine.engine.images import check_pictures
from amed_engine.engine.sampler import Sampler
from amed_engine.errors import AmedError, require
from amed_engine.integrations.serving.batching import answer, as_json

ls = require("litserve", "litserve")


class AMEDAPI(ls.LitAPI):
    """Requests that arrive within `batch_timeout` seconds are drawn as one batch."""

    def __init__(self, max_batch_size: int = 16, batch_timeout: float = 0.01, **sampler: Any):
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout)
        self.options = sampler  # of Sampler: model, predictor, nfe, ...

    def setup(self, device: str) -> None:
        self.sampler = Sampler(**self.options, device=device)
        check_pictures(self.sampler.model.shape)

    def decode_request(self, request: dict) -> dict:
        return request

    def predict(self, x: Any) -> list:
        return answer(self.sampler, x if isinstance(x, list) else [x])

    def encode_response(self, output: Tensor | AmedError | list) -> Any:
        output = output[0] if isinstance(output, list) else output  # max_batch_size=1 does not unbatch
        if isinstance(output, Tensor):
            return as_json(output)
        return require("starlette.responses", "litserve").JSONResponse({"error": str(output)}, status_code=422)


@click.command()
@click.option("--model", default="digits", show_default=True, help="Zoo name or path.")
@click.option("--predictor", type=click.Path(exists=True), help="Predictor file.")
@click.option("--nfe", type=int, help="Network evaluations per image.")
@click.option("--port", default=8000, show_default=True)
def main(model: str, predictor: str | None, nfe: int | None, port: int) -> None:
    """Serve a model."""
    server = ls.LitServer(AMEDAPI(model=model, predictor=predictor, nfe=nfe), accelerator="auto")
    server.run(host="127.0.0.1", port=port, generate_client_file=False)


if __name__ == "__main__":
    main()
