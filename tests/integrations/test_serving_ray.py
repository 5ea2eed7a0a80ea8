"""Ray Serve: requests of any kind come into one engine at once, each gets its own answer."""

import asyncio
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hosts import (
    LONG,
    PAYLOADS,
    QUEUE,
    ROWS,
    WRONG,
    Client,
    check_a_full_queue,
    check_answers,
    check_rows_fill,
    expected,
    same_pictures,
    stand_in_for_starlette,
    unused_port,
)

from amed_engine import ConfigError, EngineClosedError


@pytest.fixture(scope="module")
def images():
    return expected()


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
