"""What the server answers is what `Sampler.run` draws, in every form."""

import base64
import io
import json

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from served import Gate, as_npz, assert_same_pictures, gated, sampled

import amed_engine
from amed_engine import ConfigError, Sampler
from amed_engine.zoo import bundled_predictor

pytest.importorskip("fastapi", reason="fastapi is not installed")

import fuzzed
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from amed_engine.serving.http import Limits, make_app
from amed_engine.serving.http.service import Service

engine = fuzzed.engine
FACTS = {"model", "nfe", "plan", "backend", "buckets", "seconds"}


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(make_app({"digits": [engine]}, allow_programs=True)) as client:
        client.app.state.service.warm_up()
        yield client


def assert_close(images, expected):
    torch.testing.assert_close(torch.as_tensor(images), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


# ---- /v1/images/generations


def generated(client, **body):
    answer = client.post("/v1/images/generations", json={"prompt": "", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_prompt_names_the_class_and_n_is_honoured(client):
    answer = generated(
        client, model="digits", prompt="3", n=4, size="8x8", response_format="b64_json", user="me", seed=5
    )
    assert answer.keys() == {"created", "data", *FACTS}
    assert type(answer["created"]) is int
    assert [set(each) for each in answer["data"]] == [{"b64_json", "seed", "class_label"}] * 4
    assert [(each["seed"], each["class_label"]) for each in answer["data"]] == [(seed, 3) for seed in (5, 6, 7, 8)]
    expected = Sampler("digits").run([5, 6, 7, 8], class_labels=3)
    assert_same_pictures([each["b64_json"] for each in answer["data"]], expected.images)
    assert (answer["nfe"], answer["plan"], answer["backend"]) == (5, expected.plan.describe(), "ticks")
    assert set(answer["buckets"]) <= set(range(1, 9))


def test_seeds_draw_the_class_where_the_prompt_is_empty(client):
    answer = generated(
        client, seeds=[9, 4], nfe=3, solver="euler", guidance_scale=1.5, output_format="png", size="auto"
    )
    expected = Sampler("digits", nfe=3, solver="euler").run([9, 4], guidance_scale=1.5)
    assert [each["class_label"] for each in answer["data"]] == expected.labels.tolist()
    assert_same_pictures([each["b64_json"] for each in answer["data"]], expected.images)
    assert answer["nfe"] == 3


def test_what_is_null_is_left_out(client):
    nulls = dict.fromkeys(("model", "n", "seeds", "nfe", "solver", "size", "response_format", "user", "class_labels"))
    assert len(generated(client, **nulls, seed=1)["data"]) == 1


def test_the_seeds_that_were_drawn_draw_the_same_again(client):
    first = generated(client, n=2)
    seeds = [each["seed"] for each in first["data"]]
    assert len(set(seeds)) == 2
    assert generated(client, seeds=seeds)["data"] == first["data"]


# ---- /v1/samples


OPTIONS = [
    {},
    {"nfe": 3, "class_labels": [0, 1, 2]},
    {"nfe": 8, "predictor": "none"},
    {"nfe": 4, "solver": "dpmpp", "solver_options": {"max_order": 3}, "afs": False},
    {"nfe": 6, "solver": "heun", "schedule": "polynomial", "rho": 5.0, "guidance_scale": 2.0},
    {"nfe": 5, "solver": "ipndm", "afs": True, "schedule": "logsnr", "priority": 3, "deadline": 1000},
    {"solver": "euler", "schedule": [80.0, 10.0, 1.0, 0.002]},
    {"nfe": 5, "afs": "mean"},
]


def expected_of(options, seeds):
    options = dict(options)
    own = {name: options.pop(name, None) for name in ("class_labels", "guidance_scale")}
    for name in ("priority", "deadline"):
        options.pop(name, None)
    if isinstance(options.get("schedule"), list):
        options["schedule"] = torch.tensor(options["schedule"], dtype=torch.float64)
    return Sampler("digits", **options).run(seeds, **own)


@pytest.mark.parametrize("options", OPTIONS, ids=json.dumps)
def test_arrays_are_those_of_a_sampler(client, options):
    seeds = [3, 1, 2]
    expected, got = expected_of(options, seeds), as_npz(client, seeds=seeds, **options)
    assert set(got) == {"images", "seeds", "labels", *FACTS}
    assert got["images"].dtype == np.float32
    assert_close(got["images"], expected.images)
    assert (got["seeds"].tolist(), got["labels"].tolist()) == (seeds, expected.labels.tolist())
    assert (int(got["nfe"]), str(got["plan"])) == (expected.nfe, expected.plan.describe())
    assert (str(got["model"]), str(got["backend"])) == ("digits", "ticks")


def test_safetensors_hold_the_same_and_say_what_ran(client, tmp_path):
    file = tmp_path / "samples.safetensors"
    file.write_bytes(sampled(client, format="safetensors", seeds=[3, 1], nfe=4).content)
    expected = Sampler("digits", nfe=4).run([3, 1])
    with safetensors.safe_open(file, framework="pt") as opened:
        said = opened.metadata()
        assert set(opened.keys()) == {"images", "seeds", "labels"}
        assert_close(opened.get_tensor("images"), expected.images)
        assert opened.get_tensor("seeds").tolist() == [3, 1]
        assert torch.equal(opened.get_tensor("labels"), expected.labels)
    assert said.keys() == FACTS
    assert (said["model"], said["nfe"], said["plan"], said["backend"]) == (
        "digits",
        "4",
        expected.plan.describe(),
        "ticks",
    )
    assert set(json.loads(said["buckets"])) <= set(range(1, 9))


def test_pictures_in_json_are_those_of_a_sampler(client):
    answer = sampled(client, seeds=[8, 9], format="png", n=2).json()
    assert_same_pictures([each["b64_json"] for each in answer["data"]], Sampler("digits").run([8, 9]).images)


def test_one_sample_is_a_picture_where_that_is_asked_for(client):
    answer = client.post("/v1/samples", json={"seeds": [7]}, headers={"Accept": "image/png"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    expected = Sampler("digits").run([7])
    assert_same_pictures([base64.b64encode(answer.content)], expected.images)
    assert Image.open(io.BytesIO(answer.content)).text == {
        "model": "digits",
        "seed": "7",
        "class": str(int(expected.labels[0])),
    }


@pytest.mark.parametrize("accept", ["*/*", "application/json", "application/json, image/png", "text/html"])
def test_otherwise_the_answer_is_json(client, accept):
    answer = client.post("/v1/samples", json={"seeds": [7]}, headers={"Accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")


def test_what_the_rows_cannot_hold_is_drawn_beside_them(client):
    options = {"nfe": 4, "solver": "dpmpp", "solver_options": {"thresholding": True}}
    got = as_npz(client, seeds=[1, 2], **options)
    assert_close(got["images"], expected_of(options, [1, 2]).images)
    assert (str(got["backend"]), got["buckets"].tolist()) == ("eager", [])


# ---- programs inside requests


def test_a_recipe_comes_in_a_request(client):
    plan = amed_engine.make_plan(6, solver="deis", options={"max_order": 2}, schedule="polynomial", rho=6.0)
    expected = Sampler("digits", plan=plan).run([1, 2])
    got = as_npz(client, seeds=[1, 2], program={"plan": plan.to_json()})
    assert_close(got["images"], expected.images)
    assert str(got["plan"]) == plan.describe()
    levels = {"format": "amed_levels", "version": 1, "plan": plan.to_json()}
    np.testing.assert_array_equal(as_npz(client, seeds=[1, 2], program={"plan": levels})["images"], got["images"])


def test_a_predictor_comes_in_a_request(client, tmp_path):
    predictor = bundled_predictor("digits", 4)
    amed_engine.save_predictor(predictor, tmp_path / "own.safetensors")
    text = base64.b64encode((tmp_path / "own.safetensors").read_bytes()).decode()
    got = as_npz(client, seeds=[1, 2], program={"predictor": text})
    assert_close(got["images"], Sampler("digits", predictor).run([1, 2]).images)
    assert int(got["nfe"]) == 4


# ---- several engines


def test_a_request_goes_to_the_engine_with_the_fewest_samples():
    gate = Gate()
    gate.open.clear()
    with gated(gate, rows=2) as busy, gated(Gate(), rows=2) as idle:
        future = busy.submit([1])
        service = Service({"gate": [busy, idle]}, Limits())
        assert service.engine("gate") == ("gate", idle)
        assert [device for _, device, _ in service] == ["cpu/0", "cpu/1"]
        gate.open.set()
        future.result(60)


def test_models_are_told_apart_by_name(engine):
    with gated(Gate(), rows=2) as other, TestClient(make_app({"digits": [engine], "org/gauss": [other]})) as both:
        named = both.get("/v1/models").json()
        assert (named["object"], [each["id"] for each in named["data"]]) == ("list", ["digits", "org/gauss"])
        (digits, gauss) = named["data"]
        assert {"object": "model", "owned_by": "amed_engine"}.items() <= digits.items()
        assert (digits["shape"], digits["classes"], digits["rows"], digits["devices"]) == ([1, 8, 8], 10, 8, ["cpu"])
        assert (digits["predictors"], gauss["predictors"]) == ([3, 4, 5, 6, 7, 8, 9, 10], [])
        assert both.get("/v1/models/org/gauss").json() == gauss
        answer = generated(both, model="org/gauss", seed=1)
        assert (answer["model"], answer["data"][0]["class_label"]) == ("org/gauss", None)
        expected = Sampler(Gate(), shape=(1, 8, 8), sigma_min=0.002, sigma_max=80.0).run([1])
        assert_same_pictures([answer["data"][0]["b64_json"]], expected.images)
        refused = both.post("/v1/samples", json={"seeds": [1]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "model")


@pytest.mark.parametrize("engines", [{}, {"digits": []}])
def test_every_model_needs_an_engine(engines):
    with pytest.raises(ConfigError, match="needs an engine"):
        make_app(engines)


@pytest.mark.parametrize("limits", [{"body": 0}, {"samples": True}, {"nfe": "5"}])
def test_limits_are_numbers(limits):
    with pytest.raises(ConfigError, match=f"limit {next(iter(limits))} must be"):
        Limits(**limits)


# ---- what operators ask


def test_it_is_alive_and_ready(client):
    assert (client.get("/healthz").status_code, client.get("/readyz").json()) == (200, {"status": "ready"})


def test_it_is_not_ready_before_it_is_warm_nor_when_it_goes(engine):
    app = make_app({"digits": [engine]})
    client = TestClient(app)  # outside a with: nothing is started
    assert (client.get("/readyz").status_code, client.get("/readyz").json()) == (503, {"status": "warming up"})
    app.state.service.warm_up()
    assert client.get("/readyz").status_code == 200
    app.state.service.draining = True
    assert (client.get("/readyz").status_code, client.get("/readyz").json()) == (503, {"status": "draining"})
    refused = client.post("/v1/samples", json={"seeds": [1]})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == "draining"
    assert client.get("/healthz").status_code == 200


def test_metrics_are_what_the_engine_counts(client, engine):
    sampled(client, seeds=[1, 2, 3], nfe=4)
    answer, stats = client.get("/metrics"), engine.stats()
    assert answer.headers["content-type"].startswith("text/plain")
    found = {s.name: s for family in text_string_to_metric_families(answer.text) for s in family.samples}
    fields = {"rows": "amed_rows", "live": "amed_rows_live", "waiting": "amed_samples_waiting"}
    counted = ("ticks", "tick_seconds", "evaluations", "evaluated", "admitted", "completed", "failed", "cancelled")
    fields |= {name: f"amed_{name}_total" for name in (*counted, "refused", "beside", "captures")}
    fields |= {"missed": "amed_deadline_misses_total"}
    assert {name: found[metric].value for name, metric in fields.items()} == {n: getattr(stats, n) for n in fields}
    assert found["amed_ticks_total"].labels == {"model": "digits", "device": "cpu"}
    assert found["amed_ticks_total"].value > 0
    assert found["amed_bucket_seconds"].labels.keys() == {"model", "device", "rows"}
