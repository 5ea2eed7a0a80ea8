"""LitServe: `python -m amed_engine.integrations.serving.litserve --model digits --nfe 5`.

    curl -s localhost:8000/predict -H 'Content-Type: application/json' -d '{"seeds": [0, 1], "class_labels": 3, "nfe": 8}'

answers {"images": [PNG as base64, ...]}, or {"error": ...} with status 422, 429 (wait for Retry-After), 503 or 504.
"""

from typing import Any

import click

from amed_engine.engine.images import check_pictures
from amed_engine.errors import AmedError, require
from amed_engine.integrations.serving.hosted import Hosted, check_options, interrupt_at_sigterm, refusal

ls = require("litserve", "litserve")


class AMEDAPI(ls.LitAPI):
    """One engine per device, into which all requests come at once. options: of `Hosted`."""

    def __init__(self, **options: Any):
        super().__init__(enable_async=True)
        check_options(options)
        self.options = options

    def setup(self, device: str) -> None:
        self.hosted = Hosted(**self.options, device=device)
        check_pictures(self.hosted.engine.model.shape)

    async def decode_request(self, request: dict) -> dict:
        return request

    async def predict(self, x: Any) -> Any:
        try:
            return await self.hosted.pictures(x)
        except AmedError as error:
            return refusal(error, "litserve")

    async def encode_response(self, output: Any) -> Any:
        return output


@click.command()
@click.option("--model", default="digits", show_default=True, help="Zoo name or path.")
@click.option("--predictor", type=click.Path(exists=True), help="Predictor file.")
@click.option("--nfe", type=int, help="Network evaluations per image, where a request does not say.")
@click.option("--rows", default=64, show_default=True, help="Images drawn at once; 1024 more may wait.")
@click.option("--port", default=8000, show_default=True)
def main(port: int, **options: Any) -> None:
    """Serve a model until interrupted; what was taken is answered first."""
    interrupt_at_sigterm()
    ls.LitServer(AMEDAPI(**options), accelerator="auto").run(host="127.0.0.1", port=port, generate_client_file=False)


if __name__ == "__main__":
    main()
