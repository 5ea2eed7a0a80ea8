"""LitServe: requests of any kind come into one engine at once, each gets its own answer."""

import asyncio
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
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
    pictures,
    same_pictures,
    stand_in_for_starlette,
    unused_port,
)

from amed_engine import ConfigError
from amed_engine.engine.images import to_uint8
from amed_engine.integrations.serving.hosted import as_json


@pytest.fixture(scope="module")
def images():
    return expected()


def test_pictures_are_png_and_latents_are_refused():
    coloured = torch.rand(2, 3, 4, 5) * 2 - 1
    np.testing.assert_array_equal(pictures(as_json(coloured)), to_uint8(coloured))
    with pytest.raises(ConfigError, match="pictures need samples"):
        as_json(torch.zeros(1, 4, 8, 8))


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
