"""Errors of the engine, and bodies of any kind, as a client is told of them."""

import json

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from served import Gate, gated, packed, raw, told

from amed_engine import ConfigError

pytest.importorskip("fastapi", reason="fastapi is not installed")

import fuzzed
from fuzzed import PLAN
from starlette.testclient import TestClient

from amed_engine.serving.http import Limits, make_app
from amed_engine.serving.http.schemas import Draw, Generation
from amed_engine.solvers import solver_names
from amed_engine.solvers.schedule import SCHEDULES

engine, client = fuzzed.engine, fuzzed.client


# ---- errors of the engine


class Broken(Gate):
    """Not finite for the sample of one seed."""

    def __init__(self, seed):
        super().__init__()
        self.start = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 80

    def __call__(self, x, sigma):
        same = (x - self.start).abs().flatten(1).amax(1) < 1e-3
        return torch.where(same.reshape(-1, 1, 1, 1), torch.nan, super().__call__(x, sigma))


def test_a_sample_that_is_not_finite_is_named():
    body = {"seeds": [1, 2], "solver": "euler", "nfe": 3, "afs": False}
    with gated(Broken(2), rows=4) as broken, TestClient(make_app({"broken": [broken]})) as client:
        error = told(client.post("/v1/samples", json=body), 500)
        assert error["code"] == "non_finite"
        assert "seeds [2]" in error["message"]
        events = client.post("/v1/samples", json={**body, "stream": True}).text
        assert events.endswith("\n\n")
        (last,) = [event for event in events.split("\n\n") if event.startswith("event: error\n")]
        assert json.loads(last.partition("data: ")[2]) == {"error": error}
        assert client.post("/v1/samples", json={**body, "seeds": [1]}).status_code == 200


def test_what_fails_inside_stays_inside(engine, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("the inside")

    monkeypatch.setattr(engine, "submit", fail)
    client = TestClient(make_app({"digits": [engine]}), raise_server_exceptions=False)
    answer = client.post("/v1/samples", json={"seeds": [1]})
    assert told(answer, 500)["code"] == "internal"
    assert "the inside" not in answer.text


def test_a_closed_engine_is_unavailable():
    gone = gated(Gate(), rows=2)
    gone.close()
    client = TestClient(make_app({"gone": [gone]}))
    answer = client.post("/v1/samples", json={"seeds": [1]})
    assert told(answer, 503)["code"] == "draining"
    assert answer.headers["retry-after"] == "1"
    assert client.get("/readyz").status_code == 503


def test_an_engine_that_is_closed_gets_nothing_where_another_is_open(engine):
    gone = gated(Gate(), rows=2)
    gone.close()
    with gated(Gate(), rows=2) as there:
        client = TestClient(make_app({"one": [gone, there]}))
        assert client.post("/v1/samples", json={"seeds": [1], "nfe": 3}).status_code == 200


@pytest.mark.parametrize(
    ("engines", "options", "what"),
    [
        ({}, {}, "every model needs an engine"),
        ({"a": []}, {}, "every model needs an engine"),
        ({"": "one"}, {}, "every model needs an engine"),
        ({"a": "one"}, {}, "every model needs an engine"),
        ({"a": ["one"]}, {}, "every model needs an engine"),
        ("one", {}, "every model needs an engine"),
        (None, {"limits": {"samples": 3}}, "limits must be Limits"),
        (None, {"limits": 0}, "limits must be Limits"),
        (None, {"allow_programs": "no"}, "allow_programs must be True or False"),
    ],
)
def test_an_app_is_made_of_engines_and_limits(engine, engines, options, what):
    with pytest.raises(ConfigError, match=what):
        make_app({"digits": [engine]} if engines is None else engines, **options)


def test_a_model_is_served_by_a_list_of_engines(engine):
    with pytest.raises(ConfigError, match="every model needs an engine"):
        make_app({"digits": engine})


@pytest.mark.parametrize(
    "limit", [{"samples": 2.5}, {"body": True}, {"nfe": 0}, {"program": "1"}, {"seconds": float("inf")}]
)
def test_limits_are_whole_numbers_and_seconds(limit):
    with pytest.raises(ConfigError, match=next(iter(limit))):
        Limits(**limit)


# ---- whatever comes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PLANS = st.fixed_dictionaries({}, optional={name: st.just(value) | JSON for name, value in PLAN.items()})
OPTIONS = ("max_order", "thresholding", "predict_x0", "lower_order_final", "r", "variant")
FILES = [
    packed(latents=torch.ones(2, 1, 8, 8)),
    packed(latents=torch.ones(1, 4)),
    packed(text=torch.ones(1, 3)),
    "AAAA",
]
VALUES = {
    "n": st.integers(-1, 4),
    "seeds": st.lists(st.integers(-1, 1 << 33), max_size=3),
    "class_labels": st.integers(-1, 10) | st.lists(st.floats(-1, 10) | st.integers(0, 9), max_size=3),
    "nfe": st.integers(0, 6),
    "solver": st.sampled_from(solver_names("none", "optional", "required")),
    "guidance_scale": st.floats(-2, 5) | st.integers(-3, 1 << 62),
    "solver_options": st.dictionaries(
        st.sampled_from(OPTIONS),
        st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.text(max_size=3),
        max_size=2,
    ),
    "schedule": st.sampled_from([*SCHEDULES, "none"]) | st.lists(st.floats(0, 90), max_size=5),
    "rho": st.floats(-1, 9) | st.integers(-(1 << 62), 1 << 62),
    "afs": st.booleans(),
    "predictor": st.just("none"),
    "deadline": st.floats(1000, 1e300) | st.floats(max_value=0),
    "priority": st.integers(-(1 << 63), (1 << 63) - 1),
    "format": st.sampled_from(["png", "npz", "safetensors"]),
    "stream": st.booleans(),
    "program": st.fixed_dictionaries({}, optional={"predictor": st.text(max_size=9), "plan": PLANS}),
    "conditions": st.sampled_from(FILES) | st.text(max_size=9),
    "latents": st.sampled_from(FILES) | st.text(max_size=9),
    "prompt": st.sampled_from(["", "3", "12", "cat", "-1"]),
    "size": st.sampled_from(["8x8", "auto", "1x1"]),
    "seed": st.integers(-1, 1 << 33),
    "user": st.text(max_size=5),
}


def bodies_of(cls):
    """Objects of known keys, each with a value that it may have or with any other."""
    return st.fixed_dictionaries({}, optional={name: VALUES.get(name, JSON) | JSON for name in cls.model_fields})


@pytest.mark.parametrize(("path", "cls"), [("/v1/samples", Draw), ("/v1/images/generations", Generation)])
def test_no_body_is_an_error_of_the_server(client, path, cls):
    statuses = set()

    @settings(max_examples=50, suppress_health_check=list(HealthCheck))
    @given(bodies_of(cls) | JSON)
    @example({"seeds": [float("nan")]})  # which JSON does not have
    @example([])
    def send(body):
        data = json.dumps(body).encode()
        answer = raw(client, data, path)
        statuses.add(answer.status_code)
        if answer.status_code != 200:
            assert answer.status_code in (400, 404, 413, 422)
            told(answer, answer.status_code)

    send()
    assert {400, 422} <= statuses


def test_no_bytes_are_an_error_of_the_server(client):
    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=40), st.sampled_from(["/v1/samples", "/v1/images/generations"]))
    def send(data, path):
        told(raw(client, data, path), 422 if raw(client, data, path).status_code == 422 else 400)

    send()
