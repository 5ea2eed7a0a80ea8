"""The serving examples answer what the engine draws, each request its own, in one batch."""

import asyncio
import base64
import importlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from amed_engine import ConfigError, NonFiniteError, Sampler
from amed_engine.engine.images import to_uint8
from amed_engine.integrations.serving.batching import MAX_IMAGES, answer, as_json

PAYLOADS = [
    {"seeds": [3, 4], "class_labels": 7},
    {"seeds": [5]},
    {"seeds": [6], "class_labels": [11]},
    {"seeds": [8, 9], "class_labels": [1, 2]},
]


@pytest.fixture(scope="module")
def digits():
    return Sampler("digits", nfe=5)


@pytest.fixture(scope="module")
def expected(digits):
    return [
        digits.run([3, 4], class_labels=7).images,
        digits.run([5]).images,
        None,  # class 11 of ten
        digits.run([8, 9], class_labels=[1, 2]).images,
    ]


def pictures(answered) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in answered["images"]])


def same_pictures(answered, images) -> bool:
    """To one grey level: another batch may round a pixel the other way."""
    return int(np.abs(pictures(answered).astype(int) - to_uint8(images)[..., 0].astype(int)).max()) <= 1


class Counting:
    """A Sampler that counts its runs."""

    def __init__(self, sampler):
        self.sampler, self.model, self.runs = sampler, sampler.model, []

    def run(self, seeds, class_labels=None):
        self.runs.append(list(seeds))
        return self.sampler.run(seeds, class_labels=class_labels)


def test_requests_are_drawn_together_and_answered_apart(digits, expected):
    counting = Counting(digits)
    answers = answer(counting, PAYLOADS)
    assert counting.runs == [[3, 4, 8, 9], [5]]
    for got, images in zip(answers, expected, strict=True):
        if images is None:
            assert "0 .. 9" in str(got)
        else:
            torch.testing.assert_close(got, images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (None, "a request must be"),
        ({"seeds": [1], "steps": 3}, "a request must be"),
        ({"class_labels": [1]}, "a request must be"),
        ({"seeds": 5}, f"1 to {MAX_IMAGES} integers"),
        ({"seeds": []}, f"1 to {MAX_IMAGES} integers"),
        ({"seeds": list(range(MAX_IMAGES + 1))}, f"1 to {MAX_IMAGES} integers"),
        ({"seeds": [1.5]}, "seeds must be integers"),
        ({"seeds": [-1]}, "outside 0"),
        ({"seeds": [1], "class_labels": [10]}, "0 .. 9"),
        ({"seeds": [1], "class_labels": True}, "0 .. 9"),
        ({"seeds": [1], "class_labels": "3"}, "0 .. 9"),
        ({"seeds": [1, 2], "class_labels": [3]}, "or 2 of them"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(digits, payload, match):
    (got,) = answer(digits, [payload])
    assert isinstance(got, ConfigError)
    assert match in str(got)


def test_one_broken_sample_does_not_spoil_the_batch():
    broken = {}

    def denoiser(x, sigma):
        if "at" not in broken:
            broken["at"] = x[0].clone()
        same = (x - broken["at"]).abs().flatten(1).amax(1) == 0
        return torch.where(same.reshape(-1, 1, 1, 1), torch.nan, x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2))

    sampler = Sampler(denoiser, solver="euler", nfe=3, schedule="polynomial", afs=False, shape=(1, 4, 4))
    first, second = answer(sampler, [{"seeds": [1]}, {"seeds": [2]}])
    assert isinstance(first, NonFiniteError)
    assert second.isfinite().all()


# LitServe


@pytest.fixture
def lit(monkeypatch):
    """The example, on the real package or on the part of it that it needs."""
    if importlib.util.find_spec("litserve") is None:

        class LitAPI:
            def __init__(self, max_batch_size=1, batch_timeout=0.0):
                self.max_batch_size, self.batch_timeout = max_batch_size, batch_timeout

        monkeypatch.setitem(sys.modules, "litserve", SimpleNamespace(LitAPI=LitAPI))
        responses = SimpleNamespace(JSONResponse=lambda content, status_code: SimpleNamespace(**locals()))
        monkeypatch.setitem(sys.modules, "starlette", SimpleNamespace(responses=responses))
        monkeypatch.setitem(sys.modules, "starlette.responses", responses)
    monkeypatch.delitem(sys.modules, "amed_engine.integrations.serving.litserve", raising=False)
    yield importlib.import_module("amed_engine.integrations.serving.litserve")
    sys.modules.pop("amed_engine.integrations.serving.litserve", None)


def test_litserve_answers_a_batch_one_by_one(lit, expected):
    api = lit.AMEDAPI(model="digits", nfe=5)
    assert (api.max_batch_size, api.batch_timeout) == (16, 0.01)
    api.setup("cpu")
    outputs = [api.encode_response(output) for output in api.predict([api.decode_request(p) for p in PAYLOADS])]
    for output, images in zip(outputs, expected, strict=True):
        if images is None:
            assert output.status_code == 422
        else:
            assert same_pictures(output, images)
    assert same_pictures(api.encode_response(api.predict(PAYLOADS[1])), expected[1])


def test_the_litserve_example_is_short():
    source = importlib.util.find_spec("amed_engine.integrations.serving").submodule_search_locations[0]
    with open(os.path.join(source, "litserve.py")) as file:
        assert len(file.readlines()) < 60


def post(port, payload, path="predict"):
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{path}", body, {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def server(tmp_path):
    """The port of the example, run as its docstring says."""
    pytest.importorskip("litserve", reason="litserve is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "amed_engine.integrations.serving.litserve", "--nfe", "5", "--port", str(port)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        for _ in range(1200):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(f"no answer after minutes; the server said: {(tmp_path / 'log').read_text()}")
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_litserve_answers_concurrent_requests_over_http(server, digits, expected):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda payload: post(server, payload), PAYLOADS * 3))
    for (status, output), images in zip(answers, expected * 3, strict=True):
        if images is None:
            assert status == 422
            assert "0 .. 9" in output["error"]
        else:
            assert status == 200
            assert same_pictures(output, images)
    assert post(server, b"{not json")[0] == 422


# Ray Serve


class Deployment:
    """What `serve.deployment` makes of a class, run in this process."""

    def __init__(self, cls):
        self.cls = cls

    def bind(self, **options):
        return self.cls(**options)


def batching(max_batch_size, batch_wait_timeout_s):
    """`serve.batch`: calls that arrive within the wait are one call with a list."""

    def decorate(method):
        waiting = []

        async def call(self, item):
            future = asyncio.get_running_loop().create_future()
            waiting.append((item, future))
            if len(waiting) == 1:
                await asyncio.sleep(batch_wait_timeout_s)
                batch = waiting[:max_batch_size]
                del waiting[:max_batch_size]
                for result, (_, done) in zip(await method(self, [i for i, _ in batch]), batch, strict=True):
                    done.set_result(result)
            return await future

        return call

    return decorate


@pytest.fixture
def ray(monkeypatch):
    """The example on the part of Ray that it needs, in this process, where batches can be seen."""
    serve = SimpleNamespace(deployment=Deployment, batch=batching)
    responses = SimpleNamespace(JSONResponse=lambda content, status_code: SimpleNamespace(**locals()))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.setitem(sys.modules, "starlette", SimpleNamespace(responses=responses))
    monkeypatch.setitem(sys.modules, "starlette.responses", responses)
    monkeypatch.delitem(sys.modules, "amed_engine.integrations.serving.ray", raising=False)
    yield importlib.import_module("amed_engine.integrations.serving.ray")
    sys.modules.pop("amed_engine.integrations.serving.ray", None)


def ask_together(app, requests) -> list:
    """Answers to requests that arrive at once."""

    async def all_at_once():
        return await asyncio.gather(*(app(request) for request in requests))

    return asyncio.run(all_at_once())


class Request:
    def __init__(self, payload):
        self.payload = payload

    async def body(self):
        return self.payload if isinstance(self.payload, bytes) else json.dumps(self.payload).encode()


def test_ray_serve_answers_concurrent_requests_in_one_batch(ray, expected, monkeypatch):
    sizes, draw = [], ray.answer
    monkeypatch.setattr(
        ray, "answer", lambda sampler, payloads: (sizes.append(len(payloads)), draw(sampler, payloads))[1]
    )
    app = ray.build({"model": "digits", "nfe": "5", "device": "cpu"})
    answers = ask_together(app, [Request(payload) for payload in PAYLOADS])
    assert sizes == [4]
    for output, images in zip(answers, expected, strict=True):
        if images is None:
            assert output.status_code == 422
        else:
            assert same_pictures(output, images)


@pytest.mark.parametrize("body", [b"", b"{not json", b"\xff\xfe", b"[" * 100_000, b"[]"])
def test_ray_serve_answers_what_is_no_request_with_what_one_is(ray, body):
    app = ray.build({"model": "digits", "nfe": "5", "device": "cpu"})
    (answered,) = ask_together(app, [Request(body)])
    assert answered.status_code == 422
    assert "a request must be" in answered.content["error"]


@pytest.fixture
def ray_port():
    """The port of the example on a cluster of its own."""
    real = pytest.importorskip("ray", reason="ray is not installed")
    serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    from amed_engine.integrations.serving.ray import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    real.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"model": "digits", "nfe": "5", "device": "cpu"}))
        yield port
    finally:
        serve.shutdown()
        real.shutdown()


def test_ray_serve_answers_over_http(ray_port, digits, expected):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda payload: post(ray_port, payload, ""), PAYLOADS))
    for (status, output), images in zip(answers, expected, strict=True):
        assert status == (422 if images is None else 200)
        assert images is None or same_pictures(output, images)
    status, output = post(ray_port, b"{not json", "")
    assert (status, "a request must be" in output["error"]) == (422, True)


def test_ray_build_refuses_unknown_arguments(ray):
    with pytest.raises(ConfigError, match="unknown arguments steps"):
        ray.build({"steps": "3"})


def test_pictures_are_png_and_latents_are_refused(digits, expected):
    assert same_pictures(as_json(expected[0]), expected[0])
    coloured = torch.rand(2, 3, 4, 5) * 2 - 1
    np.testing.assert_array_equal(pictures(as_json(coloured)), to_uint8(coloured))
    with pytest.raises(ConfigError, match="pictures need samples"):
        as_json(torch.zeros(1, 4, 8, 8))
