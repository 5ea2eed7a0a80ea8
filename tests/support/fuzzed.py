"""What tests of the server share: an engine of `digits`, and a server of it with narrow limits, which takes programs."""

import pytest

import amed_engine
from amed_engine import ContinuousSampler

pytest.importorskip("fastapi", reason="fastapi is not installed")

from starlette.testclient import TestClient

from amed_engine.serving.http import Limits, make_app

LIMITS = Limits(body=20_000, samples=8, nfe=12, program=6_000)
PLAN = amed_engine.make_plan(3, solver="euler").to_json()


@pytest.fixture(scope="module")
def engine():
    with ContinuousSampler("digits", rows=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(make_app({"digits": [engine]}, limits=LIMITS, allow_programs=True)) as client:
        client.app.state.service.warm_up()
        yield client
