"""Clients of every kind: those that wait and compare, those that leave, those that are killed, those that talk nonsense."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import struct
from collections import Counter
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from amed_engine import Sampler
from amed_engine.engine.images import to_uint8
from amed_engine.errors import AmedError, require
from amed_engine.serving.load import Arrival

SEEDS = 16
TOLERANCE = 2e-5  # of the largest element, in float32; pictures may differ by one grey level
KINDS = {"right": 14, "stream": 1, "malformed": 2, "leaving": 2, "killed": 1}
MALFORMED = (
    *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 20_000, b'{"seeds": "x"}', b'{"seeds": []}', b'{"seeds": [-1]}'),
    *(b'{"seeds": [0], "nfe": 0}', b'{"seeds": [0], "nfe": 2.5}', b'{"seeds": [0], "nfe": 1000000}', b'{"n": 100000}'),
    *(
        b'{"seeds": [0], "solver": "nope"}',
        b'{"seeds": [0], "class_labels": 10}',
        b'{"seeds": [0], "guidance_scale": NaN}',
    ),
    *(b'{"seeds": [0], "unknown": 1}', b'{"seeds": [0], "model": "nope"}', b'{"seeds": [0], "format": "exe"}'),
    b'{"seeds": [' + b"0," * 2_000_000 + b"0]}",
)


class Variant(NamedTuple):
    """What the samples of a request share."""

    nfe: int
    solver: str | None = None
    guidance_scale: float | None = None


VARIANTS = (Variant(3), Variant(5), Variant(10), Variant(6, "ipndm"), Variant(4, "dpmpp"), Variant(5, None, 2.0))


class Truth:
    """Every variant of every seed, by `Sampler.run`."""

    def __init__(self, model: str):
        self.images: dict[Variant, Tensor] = {}
        for variant in VARIANTS:
            sampler = Sampler(model, nfe=variant.nfe, solver=variant.solver, device="cpu")
            self.images[variant] = sampler.run(range(SEEDS), guidance_scale=variant.guidance_scale).images

    def check(self, variant: Variant, seeds: list[int], drawn: np.ndarray) -> None:
        """Of floats (B, C, H, W), or of grey levels (B, H, W[, C]). Raises AmedError."""
        expected: np.ndarray = self.images[variant][seeds].numpy()
        if drawn.dtype == np.uint8:
            expected, allowed = to_uint8(self.images[variant][seeds]), 1.0
            drawn = drawn.reshape(*drawn.shape[:3], -1)
        else:
            allowed = TOLERANCE * float(np.abs(expected).max())
        apart = float(np.abs(drawn.astype(np.float64) - expected).max()) if drawn.shape == expected.shape else np.inf
        if not apart <= allowed:
            raise AmedError(f"wrong samples for {variant}: off by {apart:.1e}, {allowed:.1e} allowed")


class Clients:
    """`ask` is a client of the kind that the arrival's seed draws."""

    def __init__(self, url: str, truth: Truth, seed: int):
        self.truth, self.seed, self.asked = truth, seed, Counter[str]()
        self._http = require("httpx2", "serve", "asking a server")
        self.url = self._http.URL(url)

    async def __aenter__(self) -> Clients:
        limits = self._http.Limits(max_connections=None, max_keepalive_connections=20)
        self._client = self._http.AsyncClient(base_url=self.url, limits=limits, timeout=None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, arrival: Arrival) -> None:
        chance = Random(f"{self.seed} {arrival.seeds[0]}")
        (kind,) = chance.choices([*KINDS], [*KINDS.values()])
        self.asked[kind] += 1
        try:
            await getattr(self, kind)(chance)
        except self._http.HTTPError as error:
            raise AmedError(f"{kind}: {type(error).__name__} {error}") from error

    async def crowd(self) -> None:
        """All rows at once, all of them guided: the largest tick there is, whose memory is kept from then on."""
        body = {"n": 64, "nfe": 4, "guidance_scale": 2.0, "format": "npz"}
        for response in await asyncio.gather(*(self._client.post("/v1/samples", json=body) for _ in range(3))):
            response.raise_for_status()

    async def drawn(self, number: int) -> None:
        """One that waits, by number."""
        await self.right(Random(f"{self.seed} drained {number}"))

    async def right(self, chance: Random) -> None:
        variant, body = _request(chance)
        body["format"] = chance.choice(["png", "npz"])
        response = await self._client.post("/v1/samples", json=body)
        if response.status_code != 200:
            raise AmedError(f"status {response.status_code} for {variant}: {response.text[:200]}")
        self.truth.check(variant, body["seeds"], _samples(response))

    async def stream(self, chance: Random) -> None:
        variant, body = _request(chance)
        seen: dict[int, np.ndarray] = {}
        async with self._client.stream("POST", "/v1/samples", json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if "b64_json" in event:
                    seen[event["index"]] = _picture(base64.b64decode(event["b64_json"]))
        if sorted(seen) != [*range(len(body["seeds"]))]:
            raise AmedError(f"a stream of {len(body['seeds'])} samples had those of {sorted(seen)}")
        self.truth.check(variant, body["seeds"], np.stack([seen[index] for index in sorted(seen)]))

    async def malformed(self, chance: Random) -> None:
        body = chance.choice(MALFORMED)
        response = await self._client.post("/v1/samples", content=body, headers={"Content-Type": "application/json"})
        if not 400 <= response.status_code < 500 or "message" not in response.json()["error"]:
            raise AmedError(f"status {response.status_code} for {body[:60]!r}: {response.text[:200]}")

    async def leaving(self, chance: Random) -> None:
        """Closes its connection some time after asking; the answer may have been faster."""
        try:
            async with asyncio.timeout(0.3 * chance.random() ** 2):
                await self._client.post("/v1/samples", json=_request(chance)[1])
        except TimeoutError:
            pass

    async def killed(self, chance: Random) -> None:
        """Its connection is reset, while it still sends or while it waits."""
        data = json.dumps(_request(chance)[1]).encode()
        head = f"POST /v1/samples HTTP/1.1\r\nHost: {self.url.host}\r\nContent-Type: application/json\r\n"
        sent = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        _, writer = await asyncio.open_connection(self.url.host, self.url.port)
        endpoint: Any = writer.get_extra_info("socket")
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.write(sent[: chance.choice([len(sent), chance.randrange(len(sent))])])
        await asyncio.sleep(0.1 * chance.random())
        writer.transport.abort()

    async def gauges(self) -> dict[str, float]:
        """Rows taken and samples waiting, of all engines."""
        parser = require("prometheus_client.parser", "serve", "reading /metrics")
        text = (await self._client.get("/metrics")).text
        names = ("amed_rows_live", "amed_samples_waiting")
        samples = [sample for family in parser.text_string_to_metric_families(text) for sample in family.samples]
        return {name: sum(sample.value for sample in samples if sample.name == name) for name in names}


def _request(chance: Random) -> tuple[Variant, dict[str, Any]]:
    variant = chance.choice(VARIANTS)
    seeds = [chance.randrange(SEEDS) for _ in range(chance.choice([1, 1, 1, 2, 4]))]
    return variant, {"seeds": seeds, **{name: value for name, value in variant._asdict().items() if value is not None}}


def _samples(response: Any) -> np.ndarray:
    """Of an answer in any format: pictures, or numbers."""
    kind = response.headers["content-type"]
    if kind.startswith("image/"):
        return _picture(response.content)[None]
    if kind.startswith("application/json"):
        return np.stack([_picture(base64.b64decode(each["b64_json"])) for each in response.json()["data"]])
    with np.load(io.BytesIO(response.content), allow_pickle=False) as arrays:
        return arrays["images"]


def _picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))
