"""LitServe and Ray Serve: requests of any kind come into one engine at once, each gets its own answer."""

import asyncio
import http.client
import importlib
import importlib.util
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
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from served import PAYLOADS, WRONG, expected, live_rows, pictures, same_pictures

from amed_engine import ConfigError, EngineClosedError
from amed_engine.engine.images import to_uint8
from amed_engine.integrations.serving.hosted import as_json

ROWS, QUEUE = 16, 24
LONG = {"nfe": 48, "solver": "euler"}


@pytest.fixture(scope="module")
def images():
    return expected()


def test_pictures_are_png_and_latents_are_refused():
    coloured = torch.rand(2, 3, 4, 5) * 2 - 1
    np.testing.assert_array_equal(pictures(as_json(coloured)), to_uint8(coloured))
    with pytest.raises(ConfigError, match="pictures need samples"):
        as_json(torch.zeros(1, 4, 8, 8))


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


# LitServe


@pytest.fixture
def lit(monkeypatch):
    """The example, on the real package or on the part of it that it needs."""
    if importlib.util.find_spec("litserve") is None:

        class LitAPI:
            def __init__(self, enable_async=False):
                self.enable_async, self.max_batch_size = enable_async, 1

        monkeypatch.setitem(sys.modules, "litserve", SimpleNamespace(LitAPI=LitAPI))
        stand_in_for_starlette(monkeypatch)
    monkeypatch.delitem(sys.modules, "amed_engine.integrations.serving.litserve", raising=False)
    yield importlib.import_module("amed_engine.integrations.serving.litserve")
    sys.modules.pop("amed_engine.integrations.serving.litserve", None)


def stand_in_for_starlette(monkeypatch):
    responses = SimpleNamespace(JSONResponse=lambda content, status_code, headers: SimpleNamespace(**locals()))
    monkeypatch.setitem(sys.modules, "starlette", SimpleNamespace(responses=responses))
    monkeypatch.setitem(sys.modules, "starlette.responses", responses)


def test_litserve_takes_requests_at_once(lit, images):
    api = lit.AMEDAPI(model="digits", nfe=5)
    assert (api.enable_async, api.max_batch_size) == (True, 1)
    api.setup("cpu")

    async def answered(payload):
        return await api.encode_response(await api.predict(await api.decode_request(payload)))

    async def all_at_once():
        return await asyncio.gather(*map(answered, PAYLOADS))

    for i, (output, drawn) in enumerate(zip(asyncio.run(all_at_once()), images, strict=True)):
        assert output.status_code == 422 if i in WRONG else same_pictures(output, drawn)
    stats = api.hosted.engine.stats()
    assert stats.evaluations > stats.ticks
    api.hosted.close()
    assert asyncio.run(answered(PAYLOADS[0])).status_code == 503


def test_litserve_refuses_options_before_it_starts_a_worker(lit):
    with pytest.raises(ConfigError, match="unknown options max_batch_size"):
        lit.AMEDAPI(max_batch_size=16)


def test_the_litserve_example_is_short():
    source = importlib.util.find_spec("amed_engine.integrations.serving").submodule_search_locations[0]
    with open(os.path.join(source, "litserve.py")) as file:
        assert len(file.readlines()) < 60


TOLD = f"""
from dataclasses import asdict
import litserve, sys
from amed_engine.integrations.serving.litserve import AMEDAPI

class Told(AMEDAPI):
    async def predict(self, x):
        return await super().predict(x) if x else asdict(self.hosted.engine.stats())

if __name__ == "__main__":
    server = litserve.LitServer(Told(nfe=5, rows={ROWS}, queue={QUEUE}), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[-1]), generate_client_file=False)
"""


@contextmanager
def running(folder, *command):
    """The process and port of a LitServe server."""
    pytest.importorskip("litserve", reason="litserve is not installed")
    port, environment = unused_port(), {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", *command, str(port)],
            **{"cwd": folder, "env": environment, "stdout": log, "stderr": log, "start_new_session": True},
        )
    try:
        await_health(process, port, folder / "log")
        yield process, port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def await_health(process, port, log):
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"no answer after minutes; the server said: {log.read_text()}")


@pytest.fixture(scope="module")
def lit_client(tmp_path_factory):
    """Of a server that answers {} with its stats."""
    folder = tmp_path_factory.mktemp("lit")
    (folder / "told.py").write_text(TOLD)
    with running(folder, "told.py") as (_, port):
        client = Client(port, "predict")
        client.stats = lambda: client.post({})[1]
        yield client


def test_litserve_answers_concurrent_requests_over_http(lit_client, images):
    check_answers(lit_client, images)
    assert lit_client.post(b"{not json")[0] == 422
    assert lit_client.post({"seeds": [1], "deadline": 1e-6})[0] == 504


def test_litserve_lets_requests_of_many_programs_fill_the_rows(lit_client):
    check_rows_fill(lit_client)


def test_litserve_says_when_to_come_back(lit_client):
    check_a_full_queue(lit_client)


def test_litserve_answers_what_it_took_before_it_ends(tmp_path):
    module = ["-m", "amed_engine.integrations.serving.litserve"]
    with running(tmp_path, *module, "--nfe", "5", "--port") as (process, port):
        client = Client(port, "predict")
        asked = [client.send({"seeds": list(range(8)), **LONG}) for _ in range(8)]
        await_health(process, port, tmp_path / "log")  # so they were heard, too
        process.terminate()
        assert [connection.getresponse().status for connection in asked] == [200] * 8
        process.wait(60)


# Ray Serve


class Deployment:
    """What `serve.deployment` makes of a class, run in this process."""

    def __init__(self, cls, **settings):
        self.cls, self.settings = cls, settings

    def options(self, **settings):
        return Deployment(self.cls, **self.settings | settings)

    def bind(self, **options):
        app = self.cls(**options)
        app.settings = self.settings
        return app


@pytest.fixture
def ray(monkeypatch):
    """The example on the part of Ray that it needs, in this process."""
    serve = SimpleNamespace(deployment=lambda **settings: lambda cls: Deployment(cls, **settings))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    stand_in_for_starlette(monkeypatch)
    monkeypatch.delitem(sys.modules, "amed_engine.integrations.serving.ray", raising=False)
    yield importlib.import_module("amed_engine.integrations.serving.ray")
    sys.modules.pop("amed_engine.integrations.serving.ray", None)


def ask_together(app, payloads) -> list:
    """Answers to requests that arrive at once."""

    async def body(payload):
        return payload if isinstance(payload, bytes) else json.dumps(payload).encode()

    async def all_at_once():
        requests = (SimpleNamespace(body=lambda payload=payload: body(payload)) for payload in payloads)
        return await asyncio.gather(*map(app, requests))

    return asyncio.run(all_at_once())


def test_ray_serve_takes_requests_at_once(ray, images):
    app = ray.build({"model": "digits", "nfe": "5", "device": "cpu"})
    for i, (output, drawn) in enumerate(zip(ask_together(app, PAYLOADS), images, strict=True)):
        assert output.status_code == 422 if i in WRONG else same_pictures(output, drawn)
    assert app.stats()["evaluations"] > app.stats()["ticks"]


@pytest.mark.parametrize("body", [b"", b"{not json", b"\xff\xfe", b"[" * 100_000, b"[]"])
def test_ray_serve_answers_what_is_no_request_with_what_one_is(ray, body):
    (answered,) = ask_together(ray.build({"model": "digits", "device": "cpu"}), [body])
    assert answered.status_code == 422
    assert "a request must be" in answered.content["error"]


def test_ray_lets_in_more_requests_than_the_engine_can_hold(ray):
    assert ray.build({"device": "cpu"}).settings == {"max_ongoing_requests": 64 + 1024 + 1}
    assert ray.build({"device": "cpu", "rows": "8", "queue": "2"}).settings == {"max_ongoing_requests": 11}


def test_a_replica_whose_engine_ended_is_not_healthy(ray):
    app = ray.build({"device": "cpu"})
    app.check_health()
    app.__del__()  # as Ray calls it
    with pytest.raises(EngineClosedError):
        app.check_health()
    (answered,) = ask_together(app, [PAYLOADS[0]])
    assert answered.status_code == 503


@pytest.mark.parametrize(
    ("args", "match"), [({"steps": "3"}, "unknown arguments steps"), ({"rows": "many"}, "rows must be an integer")]
)
def test_ray_build_refuses_what_it_does_not_know(ray, args, match):
    with pytest.raises(ConfigError, match=match):
        ray.build(args)


@pytest.fixture(scope="module")
def ray_client():
    """Of the example on a cluster of its own."""
    real = pytest.importorskip("ray", reason="ray is not installed")
    serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    from amed_engine.integrations.serving.ray import build

    port, args = unused_port(), {"nfe": "5", "device": "cpu", "rows": str(ROWS), "queue": str(QUEUE)}
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    real.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        handle = serve.run(build(args))
        yield Client(port, "", lambda: handle.stats.remote().result(timeout_s=60))
    finally:
        serve.shutdown()
        real.shutdown()


def test_ray_serve_answers_over_http(ray_client, images):
    check_answers(ray_client, images)
    status, output, _ = ray_client.post(b"{not json")
    assert (status, "a request must be" in output["error"]) == (422, True)


def test_ray_serve_lets_requests_of_many_programs_fill_the_rows(ray_client):
    check_rows_fill(ray_client)


def test_ray_serve_says_when_to_come_back(ray_client):
    check_a_full_queue(ray_client)


def test_ray_serve_cancels_for_a_client_that_goes_away(ray_client):
    before = ray_client.stats()["cancelled"]
    leaving = ray_client.send({"seeds": list(range(16)), "nfe": 64, "solver": "euler"})
    ray_client.until(lambda stats: stats["live"] == 16)
    leaving.close()
    ray_client.until(lambda stats: stats["cancelled"] == before + 16 and not stats["live"])


def test_ray_serve_answers_what_it_took_before_it_ends(ray_client):
    from ray import serve

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ray_client.post, {"seeds": list(range(8)), **LONG}) for _ in range(2)]
        ray_client.until(lambda stats: stats["live"] == 16)
        serve.delete("default")
        assert [future.result()[0] for future in asked] == [200] * 2
