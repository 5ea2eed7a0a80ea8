"""Requests of every kind to a server that serves digits with 5 evaluations, the answers to them, and a client."""

import base64
import http.client
import io
import json
import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
from PIL import Image

from amed_engine import Sampler
from amed_engine.engine.images import to_uint8

PAYLOADS = [
    {"seeds": [3, 4], "class_labels": 7},
    {"seeds": [5]},
    {"seeds": [6], "class_labels": [11]},  # of ten
    {"seeds": [8, 9], "class_labels": [1, 2], "nfe": 3},
    {"seeds": [10], "nfe": 10, "solver": "euler"},
    {"seeds": [11], "class_labels": 4, "guidance_scale": 2.0},
    {"seeds": [12, 13], "class_labels": 2, "nfe": 7, "solver": "unipc", "guidance_scale": 1.5},
    {"seeds": [14], "solver": "dpmpp", "priority": 2, "deadline": 600},
    {"seeds": [15], "solver": "nope"},
    {"seeds": [2], "nfe": 0},
]
ROWS, QUEUE = 16, 24  # of the servers
LONG = {"nfe": 48, "solver": "euler"}
WRONG = {2: "0 .. 9", 8: "unknown solver 'nope'", 9: "nfe must be an integer from 1"}


def expected():
    """The images of each of PAYLOADS, as `Sampler.run` draws them alone; None for those that are WRONG."""
    return [None if i in WRONG else _drawn(**payload) for i, payload in enumerate(PAYLOADS)]


def _drawn(seeds, class_labels=None, nfe=5, solver=None, guidance_scale=None, **_):
    return Sampler("digits", nfe=nfe, solver=solver, device="cpu").run(seeds, class_labels, guidance_scale).images


def pictures(answered) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in answered["images"]])


def same_pictures(answered, images) -> bool:
    """To one grey level: another batch may round a pixel the other way."""
    return int(np.abs(pictures(answered).astype(int) - to_uint8(images)[..., 0].astype(int)).max()) <= 1


def live_rows(before: dict, after: dict) -> float:
    """How many rows a tick had in the mean, from an engine's stats before and after."""
    return (after["evaluations"] - before["evaluations"]) / (after["ticks"] - before["ticks"])


def unused_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Client:
    """Of a server on loopback. stats: what its engine did so far."""

    def __init__(self, port, path, stats=None):
        self.port, self.url, self.stats = port, f"http://127.0.0.1:{port}/{path}", stats

    def post(self, payload):
        """(status, what was answered, its headers)."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response), response.headers
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), error.headers

    def ask_all(self, payloads, clients):
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(self.post, payloads))

    def send(self, payload):
        """The connection that a request went out by."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", self.url, json.dumps(payload), {"Content-Type": "application/json"})
        return connection

    def until(self, reached):
        """The first stats of which `reached` holds."""
        end = time.monotonic() + 60
        while not reached(stats := self.stats()):
            assert time.monotonic() < end, stats
            time.sleep(0.01)
        return stats


def check_answers(client, images):
    """Of all kinds of requests, three of each at once."""
    for i, (status, output, _) in enumerate(client.ask_all(PAYLOADS * 3, 16)):
        kind = i % len(PAYLOADS)
        assert status == (422 if kind in WRONG else 200)
        assert WRONG[kind] in output["error"] if kind in WRONG else same_pictures(output, images[kind])


def check_rows_fill(client):
    before = client.stats()
    payloads = [{"seeds": [i], "nfe": (16, 24, 32)[i % 3], "solver": ("euler", "ipndm")[i % 2]} for i in range(96)]
    assert {status for status, *_ in client.ask_all(payloads, 16)} == {200}
    assert live_rows(before, client.stats()) > ROWS / 2


def check_a_full_queue(client):
    answers = client.ask_all([{"seeds": list(range(32)), **LONG}] * 4, 4)  # 40 fit
    refused = [(output["error"], headers) for status, output, headers in answers if status == 429]
    assert len(refused) + sum(status == 200 for status, *_ in answers) == 4
    assert refused
    for message, headers in refused:
        assert "got 32 samples" in message
        assert int(headers["Retry-After"]) >= 1


def stand_in_for_starlette(monkeypatch):
    responses = SimpleNamespace(JSONResponse=lambda content, status_code, headers: SimpleNamespace(**locals()))
    monkeypatch.setitem(sys.modules, "starlette", SimpleNamespace(responses=responses))
    monkeypatch.setitem(sys.modules, "starlette.responses", responses)
