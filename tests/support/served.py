"""What the tests of the server share: a network that waits to be let through, a server on a free port, pictures in answers."""

import base64
import contextlib
import io
import threading
from collections.abc import Iterator

import numpy as np
import safetensors.torch
from PIL import Image

from amed_engine import ContinuousSampler
from amed_engine.engine.images import to_uint8


class Gate:
    """The denoiser of data from N(0, 1), which answers while it is open."""

    def __init__(self):
        self.open, self.calls = threading.Event(), 0
        self.open.set()

    def __call__(self, x, sigma):
        self.calls += 1
        assert self.open.wait(60), "nobody opened the gate"
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


def gated(gate: Gate, **options) -> ContinuousSampler:
    return ContinuousSampler(gate, shape=(1, 8, 8), sigma_min=0.002, sigma_max=80.0, verify=False, **options)


@contextlib.contextmanager
def served(app, grace: float = 30.0, close=lambda: None) -> Iterator:
    """The server, in a thread; `port` says where."""
    from amed_engine.serving.http.run import Server, listener

    ready = threading.Event()
    with listener("127.0.0.1", 0) as bound:
        server = Server(app, grace, ready=ready.set, close=close)
        server.port = bound.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            assert ready.wait(60)
            yield server
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def assert_same_pictures(texts, images) -> None:
    """To one grey level: other last bits may round a pixel the other way."""
    got = np.stack([pixels(text) for text in texts]).astype(int)
    assert np.abs(got - to_uint8(images)[..., 0].astype(int)).max() <= 1


def told(answer, status: int) -> dict:
    """The error of an answer, whose shape is checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "code", "param"}
    assert error["type"] == {429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert "Traceback" not in answer.text
    assert ".py" not in answer.text
    return error


def sampled(client, **body):
    """The answer to a request that is served."""
    answer = client.post("/v1/samples", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def as_npz(client, **body):
    return np.load(io.BytesIO(sampled(client, format="npz", **body).content))


def raw(client, body: bytes, path: str = "/v1/samples", kind: str = "application/json"):
    return client.post(path, content=body, headers={"Content-Type": kind})


def packed(**tensors) -> str:
    """A .safetensors file as a request brings it."""
    return base64.b64encode(safetensors.torch.save(tensors)).decode()
