"""What the server refuses, and that every refusal has one shape and says nothing of its inside."""

import asyncio
import base64
import json

import pytest
from served import Gate, gated, raw, told

from amed_engine import ContinuousSampler

pytest.importorskip("fastapi", reason="fastapi is not installed")

import fuzzed
from fuzzed import LIMITS, PLAN
from starlette.testclient import TestClient

from amed_engine.serving.http import Limits, bodies, make_app
from amed_engine.serving.http.errors import Refusal

engine, client = fuzzed.engine, fuzzed.client


# ---- bodies


NOT_JSON = {
    "empty": b"",
    "cut": b'{"seeds": [1',
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"seeds": [1]}'.encode("utf-16"),
    "NaN": b'{"guidance_scale": NaN}',
    "infinity": b'{"guidance_scale": -Infinity}',
    "beyond float64": b'{"guidance_scale": 1e999}',
    "beyond 64 bits": b'{"seeds": [18446744073709551616]}',
    "thousands of digits": b'{"seeds": [' + b"9" * 5000 + b"]}",
    "twice": b'{"seeds": [1], "seeds": [2]}',
    "twice, inside": b'{"program": {"plan": {"a": 1, "a": 2}}}',
    "deep": b"[" * 9000 + b"]" * 9000,
    "deeper than allowed": b'{"solver_options": ' + b"[" * 40 + b"]" * 40 + b"}",
    "half a pair": b'{"solver": "\\ud800"}',
    "half a pair as a key": b'{"\\udc00": 1}',
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_told_so(client, body):
    assert told(raw(client, body), 400)["code"] == "not_json"


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"seeds"', b"true"])
def test_a_body_is_an_object(client, body):
    assert "must be a JSON object" in told(raw(client, body), 422)["message"]


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"])
def test_a_body_says_that_it_is_json(client, kind):
    told(raw(client, b'{"seeds": [1]}', kind=kind), 415)


def test_parameters_of_the_type_are_passed_over(client):
    assert raw(client, b'{"seeds": [1]}', kind="Application/JSON; charset=utf-8").status_code == 200


def test_a_large_body_is_refused_by_its_length(client):
    assert told(raw(client, b" " * (LIMITS.body + 1)), 413)["code"] == "too_large"
    assert raw(client, b'{"seeds": [1]}'.ljust(LIMITS.body)).status_code == 200


def test_a_large_body_without_a_length_is_refused_while_it_comes(client):
    sent = []

    def chunks():
        for _ in range(1000):
            sent.append(1000)
            yield b" " * 1000

    told(client.post("/v1/samples", content=chunks(), headers={"Content-Type": "application/json"}), 413)


class Slow:
    """A request whose body never ends."""

    def __init__(self):
        self.headers = {"content-type": "application/json"}

    async def stream(self):
        yield b"{"
        await asyncio.Event().wait()


def test_a_body_that_does_not_come_is_given_up():
    with pytest.raises(Refusal) as refused:
        asyncio.run(bodies.read(Slow(), Limits(seconds=0.01)))
    assert (refused.value.status, refused.value.code) == (408, "timeout")


# ---- keys and values


def test_an_unknown_key_is_refused_everywhere(client):
    for path, body in [
        ("/v1/samples", {"seed": 1}),
        ("/v1/samples", {"Seeds": [1]}),
        ("/v1/samples", {"seeds": [1], "prompt": "3"}),
        ("/v1/samples", {"seeds": [1], "quality": None}),
        ("/v1/samples", {"seeds": [1], "program": {"plan": PLAN, "name": "mine"}}),
        ("/v1/images/generations", {"prompt": "3", "style": "vivid"}),
        ("/v1/images/generations", {"prompt": "3", "": 1}),
    ]:
        error = told(client.post(path, json=body), 422)
        assert error["code"] == "unknown_key"
        assert "known are" in error["message"]


def test_an_unknown_entry_of_a_recipe_is_refused(client):
    error = told(client.post("/v1/samples", json={"program": {"plan": {**PLAN, "note": 1}}}), 422)
    assert "unknown entries note" in error["message"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/digits"])
def test_no_query_parameter_passes(client, path):
    assert told(client.get(f"{path}?limit=1"), 422)["param"] == "limit"
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("query", ["nfe=3", "?", "%ff=1", "a=1&b=2"])
def test_no_query_parameter_passes_with_a_body(client, query):
    told(client.post(f"/v1/samples?{query}", json={"seeds": [1]}), 422)


WRONG = [
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 2.0}, "n"),
    ({"n": "2"}, "n"),
    ({"n": True}, "n"),
    ({"n": 9}, "n"),
    ({"n": 1 << 60}, "n"),
    ({"n": 3, "seeds": [1, 2]}, "n"),
    ({"seeds": []}, None),
    ({"seeds": 5}, "seeds"),
    ({"seeds": ["1"]}, "seeds"),
    ({"seeds": [1.5]}, "seeds"),
    ({"seeds": [True]}, "seeds"),
    ({"seeds": [-1]}, None),
    ({"seeds": [1 << 32]}, None),
    ({"seeds": list(range(9))}, "seeds"),
    ({"class_labels": True}, "class_labels"),
    ({"class_labels": "3"}, "class_labels"),
    ({"class_labels": 10}, None),
    ({"class_labels": -1}, None),
    ({"class_labels": 1 << 62}, None),
    ({"class_labels": 0.5}, None),
    ({"class_labels": [1, 2]}, None),
    ({"class_labels": [[1.0, 2.0]]}, None),
    ({"class_labels": [[1.0], []]}, None),
    ({"class_labels": [[[1]]]}, "class_labels"),
    ({"nfe": 0}, "nfe"),
    ({"nfe": 13}, "nfe"),
    ({"nfe": "5"}, "nfe"),
    ({"solver": "warp"}, None),
    ({"solver": 3}, "solver"),
    ({"solver": "heun", "nfe": 4, "afs": False, "rho": "7"}, "rho"),
    ({"solver_options": {"max_order": 99}}, None),
    ({"solver_options": {"max_order": [1]}}, "solver_options"),
    ({"solver": "ipndm", "solver_options": {"order": 1}}, None),
    ({"guidance_scale": "2"}, "guidance_scale"),
    ({"guidance_scale": 1e39}, None),
    ({"schedule": "/etc/passwd"}, None),
    ({"schedule": []}, "schedule"),
    ({"schedule": [80.0, 90.0]}, None),
    ({"schedule": [80.0, 0.0]}, None),
    ({"schedule": [80.0] * 15}, "nfe"),
    ({"rho": True}, "rho"),
    ({"afs": "zero"}, "afs"),
    ({"afs": 1}, "afs"),
    ({"predictor": "own.safetensors"}, "predictor"),
    ({"predictor": ""}, "predictor"),
    ({"deadline": 0}, "deadline"),
    ({"deadline": -1}, "deadline"),
    ({"deadline": True}, "deadline"),
    ({"priority": 0.5}, "priority"),
    ({"format": "jpeg"}, "format"),
    ({"format": "npz", "stream": True}, "format"),
    ({"stream": 1}, "stream"),
    ({"model": 3}, "model"),
    ({"program": []}, "program"),
    ({"program": {}}, "program"),
    ({"program": {"plan": PLAN, "predictor": ""}}, "program"),
    ({"program": {"plan": "euler"}}, "program.plan"),
    ({"program": {"plan": {}}}, None),
    ({"program": {"plan": {**PLAN, "solver": "warp"}}}, None),
    ({"program": {"plan": {**PLAN, "options": {"max_order": [1]}}}}, None),
    ({"program": {"plan": {"format": "amed_levels"}}}, None),
    ({"program": {"plan": PLAN}, "nfe": 7}, None),
    ({"program": {"predictor": "!"}}, "program.predictor"),
    ({"program": {"predictor": "é"}}, "program.predictor"),
    ({"program": {"predictor": "AAAA"}}, None),
    ({"program": {"predictor": base64.b64encode(b"\x80\x04N.").decode()}}, None),  # a pickle
    ({"program": {"predictor": "AAAA"}, "predictor": "none"}, "predictor"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda value: json.dumps(value)[:60])
def test_a_wrong_value_is_named(client, body, param):
    error = told(client.post("/v1/samples", json={"seeds": [1], **body} if "n" not in body else body), 422)
    assert error["param"] == param
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a cat"}, "prompt"),
        ({"prompt": " 3"}, "prompt"),
        ({"prompt": "٣"}, "prompt"),
        ({"prompt": "10"}, None),
        ({"prompt": "3", "class_labels": 3}, "prompt"),
        ({"prompt": "", "size": "16x16"}, "size"),
        ({"prompt": "", "size": "8"}, "size"),
        ({"prompt": "", "response_format": "url"}, "response_format"),
        ({"prompt": "", "output_format": "webp"}, "output_format"),
        ({"prompt": "", "seed": 1, "seeds": [1]}, "seed"),
        ({"prompt": "", "seed": -1}, None),
        ({"prompt": "", "seed": (1 << 32) - 1, "n": 2}, None),
        ({"prompt": "", "n": 1 << 60, "seed": 1}, "n"),
        ({"prompt": "", "user": 7}, "user"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_wrong_generation_is_named(client, body, param):
    assert told(client.post("/v1/images/generations", json=body), 422)["param"] == param


def test_a_model_without_classes_knows_no_prompt():
    with gated(Gate(), rows=2) as plain, TestClient(make_app({"plain": [plain]})) as client:
        error = told(client.post("/v1/images/generations", json={"prompt": "3"}), 422)
        assert "understands no prompt" in error["message"]
        told(client.post("/v1/samples", json={"class_labels": 3}), 422)
        assert client.post("/v1/images/generations", json={"prompt": ""}).status_code == 200


def test_what_is_no_picture_is_sent_as_arrays_alone():
    with (
        ContinuousSampler(Gate(), rows=2, shape=(4, 2, 2), sigma_min=0.002, sigma_max=80.0, verify=False) as latent,
        TestClient(make_app({"latent": [latent]})) as client,
    ):
        for path, body in (("samples", {}), ("images/generations", {"prompt": ""}), ("samples", {"stream": True})):
            assert "pictures need samples" in told(client.post(f"/v1/{path}", json=body), 422)["message"]
        assert latent.stats().admitted == 0
        assert client.post("/v1/samples", json={"format": "npz"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/samples", "/v1/images/generations"])
def test_an_unknown_model_is_not_found(client, path):
    error = told(client.post(path, json={"prompt": "", "model": "cat"} if "images" in path else {"model": "cat"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_one_picture_is_one_sample(client):
    asked = {"headers": {"Accept": "image/png"}}
    assert told(client.post("/v1/samples", json={"n": 2}, **asked), 406)["param"] == "n"
    assert told(client.post("/v1/samples", json={"seeds": [1, 2]}, **asked), 406)["param"] == "seeds"
    assert client.post("/v1/samples", json={"n": 2, "format": "npz"}, **asked).status_code == 200


def test_other_paths_and_methods(client):
    for path in ("/", "/docs", "/openapi.json", "/v1/samples/", "/v1/models/none", "/v1/chat/completions"):
        told(client.get(path), 404)
    assert told(client.get("/v1/samples"), 405)["code"] == "method_not_allowed"
    assert client.get("/v1/samples").headers["allow"] == "POST"
    told(client.delete("/v1/models"), 405)
