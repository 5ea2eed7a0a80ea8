"""Solvers inside requests: refused unless they are allowed, and bounded."""

import base64

import pytest
import torch
from served import told

import amed_engine
from amed_engine import ContinuousSampler
from amed_engine.zoo import bundled_predictor

pytest.importorskip("fastapi", reason="fastapi is not installed")

import fuzzed
from fuzzed import LIMITS, PLAN
from starlette.testclient import TestClient

from amed_engine.serving.http import Limits, make_app

engine, client = fuzzed.engine, fuzzed.client


@pytest.fixture(scope="module")
def closed(engine):
    """Takes no programs."""
    with TestClient(make_app({"digits": [engine]}, limits=LIMITS)) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"program": {"plan": PLAN}}, "program"),
        ({"program": {"predictor": "AAAA"}}, "program"),
        ({"schedule": [80.0, 1.0, 0.01]}, "schedule"),
        ({"afs": "mean"}, "afs"),
    ],
)
def test_no_program_passes_where_none_is_allowed(closed, body, param):
    error = told(closed.post("/v1/samples", json=body), 403)
    assert (error["code"], error["param"]) == ("programs_not_allowed", param)
    assert "--allow-programs" in error["message"]


def test_a_program_is_bounded_in_bytes(client):
    plan = {**PLAN, "model": "x" * LIMITS.program}
    assert told(client.post("/v1/samples", json={"program": {"plan": plan}}), 413)["param"] == "program.plan"
    text = "A" * (2 * LIMITS.program)
    assert told(client.post("/v1/samples", json={"program": {"predictor": text}}), 413)["param"] == "program.predictor"


def test_a_program_is_bounded_in_evaluations(client, engine):
    before = engine.stats().admitted
    levels = torch.logspace(1.9, -2.7, 15).tolist()
    for program in ({"schedule": levels}, {"program": {"plan": {**PLAN, "sigmas": levels}}}):
        assert "at most 12" in told(client.post("/v1/samples", json=program), 422)["message"]
    heun = {"schedule": levels[:9], "solver": "heun"}  # 16 evaluations on 8 intervals
    assert "at most 12" in told(client.post("/v1/samples", json=heun), 422)["message"]
    assert engine.stats().admitted == before


def test_a_predictor_is_bounded_in_evaluations(engine, tmp_path):
    amed_engine.save_predictor(bundled_predictor("digits", 8), tmp_path / "own.safetensors")
    text = base64.b64encode((tmp_path / "own.safetensors").read_bytes()).decode()
    app = make_app({"digits": [engine]}, limits=Limits(nfe=7), allow_programs=True)
    error = told(TestClient(app).post("/v1/samples", json={"program": {"predictor": text}}), 422)
    assert "at most 7" in error["message"]


def test_a_predictor_of_another_model_is_refused(tmp_path, tiny_conditional):
    amed_engine.save_predictor(bundled_predictor("digits", 4), tmp_path / "own.safetensors")
    text = base64.b64encode((tmp_path / "own.safetensors").read_bytes()).decode()
    with ContinuousSampler(tiny_conditional, rows=2) as other:
        client = TestClient(make_app({"other": [other]}, allow_programs=True))
        told(client.post("/v1/samples", json={"program": {"predictor": text}}), 422)
