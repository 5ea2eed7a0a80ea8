"""What the server refuses, and that every refusal has one shape and says nothing of its inside."""

import asyncio
import base64
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Gate, gated

import amed_engine
from amed_engine import ContinuousSampler
from amed_engine.zoo import bundled_predictor

pytest.importorskip("fastapi", reason="fastapi is not installed")

from starlette.testclient import TestClient

from amed_engine.serving.http import Limits, bodies, make_app
from amed_engine.serving.http.errors import Refusal
from amed_engine.serving.http.schemas import Draw, Generation

LIMITS = Limits(body=20_000, samples=8, nfe=12, program=6_000)
PLAN = amed_engine.make_plan(3, solver="euler").to_json()


@pytest.fixture(scope="module")
def engine():
    with ContinuousSampler("digits", rows=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(make_app({"digits": [engine]}, limits=LIMITS, allow_programs=True)) as client:
        yield client


@pytest.fixture(scope="module")
def closed(engine):
    """Takes no programs."""
    with TestClient(make_app({"digits": [engine]}, limits=LIMITS)) as client:
        yield client


def told(answer, status: int) -> dict:
    """The error of an answer, whose shape is checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "code", "param"}
    assert error["type"] == {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert "Traceback" not in answer.text
    assert ".py" not in answer.text
    return error


def raw(client, body: bytes, path: str = "/v1/samples", kind: str = "application/json"):
    return client.post(path, content=body, headers={"Content-Type": kind})


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

    headers = {"content-type": "application/json"}

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
    ({"schedule": "/etc/passwd"}, None),
    ({"schedule": []}, "schedule"),
    ({"schedule": [80.0, 90.0]}, None),
    ({"schedule": [80.0, 0.0]}, None),
    ({"schedule": [80.0] * 15}, "nfe"),
    ({"rho": True}, "rho"),
    ({"afs": "zero"}, "afs"),
    ({"afs": 1}, "afs"),
    ({"predictor": "/tmp/own.safetensors"}, "predictor"),
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


# ---- programs


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


# ---- whatever comes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
VALUES = {
    "n": st.integers(-1, 4),
    "seeds": st.lists(st.integers(-1, 1 << 33), max_size=3),
    "class_labels": st.integers(-1, 10) | st.lists(st.floats(-1, 10) | st.integers(0, 9), max_size=3),
    "nfe": st.integers(0, 6),
    "solver": st.sampled_from(["euler", "heun", "dpm", "ipndm", "deis", "dpmpp", "unipc", "amed", "nonstationary", "consistency"]),
    "guidance_scale": st.floats(-2, 5) | st.integers(-3, 1 << 62),
    "solver_options": st.dictionaries(
        st.sampled_from(["max_order", "thresholding", "predict_x0", "lower_order_final", "r", "variant"]),
        st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.text(max_size=3),
        max_size=2,
    ),
    "schedule": st.sampled_from(["polynomial", "logsnr", "time_uniform", "discrete"]) | st.lists(st.floats(0, 90), max_size=5),
    "rho": st.floats(-1, 9) | st.integers(-(1 << 62), 1 << 62),
    "afs": st.booleans(),
    "predictor": st.just("none"),
    "deadline": st.floats(-1, 1e300),
    "priority": st.integers(-(1 << 63), (1 << 63) - 1),
    "format": st.sampled_from(["png", "npz", "safetensors"]),
    "stream": st.booleans(),
    "program": st.fixed_dictionaries({}, optional={"predictor": st.text(max_size=9), "plan": st.fixed_dictionaries({}, optional={name: st.just(value) | JSON for name, value in PLAN.items()})}),
    "prompt": st.sampled_from(["", "3", "12", "cat", "-1"]),
    "size": st.sampled_from(["8x8", "auto", "1x1"]),
    "seed": st.integers(-1, 1 << 33),
    "user": st.text(max_size=5),
}  # fmt: skip


def bodies_of(cls):
    """Objects of known keys, each with a value that it may have or with any other."""
    return st.fixed_dictionaries({}, optional={name: VALUES.get(name, JSON) | JSON for name in cls.model_fields})


@pytest.mark.parametrize(("path", "cls"), [("/v1/samples", Draw), ("/v1/images/generations", Generation)])
def test_no_body_is_an_error_of_the_server(client, path, cls):
    statuses = set()

    @settings(max_examples=80, suppress_health_check=list(HealthCheck))
    @given(bodies_of(cls) | JSON)
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
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=40), st.sampled_from(["/v1/samples", "/v1/images/generations"]))
    def send(data, path):
        told(raw(client, data, path), 422 if raw(client, data, path).status_code == 422 else 400)

    send()
