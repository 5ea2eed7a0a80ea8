"""Conditions and latents of a request are those of `ContinuousSampler.submit`, in every form of the answer."""

import base64
import io
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from prompted import NONE, PLAN, SHAPE, largest, made, prompts, wrapped
from served import as_npz, assert_same_pictures, packed, pixels, sampled, told

import amed_engine
from amed_engine import ContinuousSampler, Sampler

pytest.importorskip("fastapi", reason="fastapi is not installed")

import fuzzed
import prompted as conditioned
from starlette.testclient import TestClient

from amed_engine.serving.http import Limits, make_app

PROMPT = prompts()
TEXT = packed(**PROMPT)
engine, client = fuzzed.engine, fuzzed.client  # of digits
prompted, asked = conditioned.prompted, conditioned.asked
THRESHOLDED = {"solver": "dpmpp", "solver_options": {"thresholding": True}, "nfe": 4}


def noise(count, *shape):
    return torch.randn(count, *(shape or (1, 8, 8)), generator=torch.Generator().manual_seed(count))


def events(text):
    return [json.loads(each.partition("data: ")[2]) for each in text.split("\n\n") if each.startswith("event: sample")]


# ---- conditions


@pytest.mark.parametrize("scale", [None, 2.5])
def test_conditions_are_those_of_the_engine(asked, prompted, scale):
    submitted = prompted.submit([1, 2, 3], conditions=PROMPT, guidance_scale=scale, **PLAN).result(60).images
    plain = prompted.submit([1, 2, 3], conditions=NONE, guidance_scale=scale, **PLAN).result(60).images
    got = as_npz(asked, seeds=[1, 2, 3], conditions=TEXT, guidance_scale=scale, **PLAN)
    assert largest(torch.as_tensor(got["images"]), submitted) < 2e-5
    assert largest(plain, submitted) > 1e-2  # they matter
    assert got["seeds"].tolist() == [1, 2, 3]
    assert "labels" not in got


def test_one_row_of_conditions_is_for_all_samples(asked, prompted):
    one = {name: value[1:2] for name, value in PROMPT.items()}
    expected = prompted.submit([4, 5], conditions=one, **PLAN).result(60).images
    got = as_npz(asked, seeds=[4, 5], conditions=packed(**one), **PLAN)
    assert largest(torch.as_tensor(got["images"]), expected) < 2e-5


def test_conditions_may_be_of_any_floats(asked, prompted):
    half = {name: value.half() for name, value in PROMPT.items()}
    expected = prompted.submit([1, 2, 3], conditions=half, **PLAN).result(60).images
    for dtype in (torch.float16, torch.float64):
        given = packed(**{name: value.to(dtype) for name, value in half.items()})
        got = as_npz(asked, seeds=[1, 2, 3], conditions=given, **PLAN)
        assert largest(torch.as_tensor(got["images"]), expected) < 2e-5


def test_conditions_may_be_streamed(asked, prompted):
    expected = prompted.submit([1, 2, 3], conditions=PROMPT, **PLAN).result(60).images
    found = sorted(
        events(sampled(asked, seeds=[1, 2, 3], conditions=TEXT, stream=True, **PLAN).text),
        key=lambda each: each["index"],
    )
    assert [(each["seed"], each["class_label"]) for each in found] == [(1, None), (2, None), (3, None)]
    assert_same_pictures([each["b64_json"] for each in found], expected)


def test_conditions_and_latents_go_together(asked, prompted):
    given = noise(3, *SHAPE)
    expected = prompted.submit(given, conditions=PROMPT, **PLAN).result(60).images
    got = as_npz(asked, latents=packed(latents=given), conditions=TEXT, **PLAN)
    assert largest(torch.as_tensor(got["images"]), expected) < 2e-5
    assert not {"seeds", "labels"} & set(got)


def test_a_model_says_what_conditions_it_takes(asked, client):
    rows = {"text": {"shape": [5, 6], "dtype": "float32"}, "mask": {"shape": [5], "dtype": "float32"}}
    assert asked.get("/v1/models/prompted").json()["conditions"] == rows
    assert client.get("/v1/models/digits").json()["conditions"] == {}


def test_the_first_client_does_not_say_the_shapes():
    """They would be everybody's, and make room for all rows."""
    net = wrapped(made(), ["text", "mask"])
    with ContinuousSampler(net, rows=2, shape=SHAPE, verify=False) as engine:
        client = TestClient(make_app({"fresh": [engine]}))
        body = {"seeds": [1], "conditions": packed(text=torch.zeros(1, 9, 6), mask=torch.ones(1, 9)), **PLAN}
        error = told(client.post("/v1/samples", json=body), 422)
        assert error["param"] == "conditions"
        assert "not known to this server yet" in error["message"]
        assert client.get("/v1/models/fresh").json()["conditions"] == {"text": None, "mask": None}
        own = {name: value[:1] for name, value in PROMPT.items()}
        expected = engine.submit([1], conditions=own, **PLAN).result(60).images
        got = as_npz(client, seeds=[1], conditions=packed(**own), **PLAN)
        assert largest(torch.as_tensor(got["images"]), expected) < 2e-5


# ---- latents


@pytest.mark.parametrize(
    "options", [{}, {"class_labels": [3, 1, 4]}, {"guidance_scale": 2, "class_labels": 5}, THRESHOLDED], ids=str
)
def test_latents_are_those_of_the_engine(client, engine, options):
    given = noise(3)
    expected = engine.submit(given, **options).result(60)
    got = as_npz(client, latents=packed(latents=given), n=3, **options)
    assert largest(torch.as_tensor(got["images"]), expected.images) < 2e-5
    assert got["labels"].tolist() == expected.labels.tolist()
    assert "seeds" not in got


def test_latents_are_those_of_a_sampler(client):
    expected = Sampler("digits", nfe=4).run(noise(2), class_labels=7).images
    answer = sampled(client, latents=packed(latents=noise(2)), class_labels=7, nfe=4).json()
    assert [(each["seed"], each["class_label"]) for each in answer["data"]] == [(None, 7), (None, 7)]
    assert_same_pictures([each["b64_json"] for each in answer["data"]], expected)


def test_no_form_of_the_answer_makes_up_seeds(client, engine):
    given, body = noise(1), {"latents": packed(latents=noise(1)), "class_labels": 3}
    (expected,) = engine.submit(given, class_labels=3).result(60).images
    tensors = safetensors.torch.load(sampled(client, format="safetensors", **body).content)
    assert set(tensors) == {"images", "labels"}
    assert largest(tensors["images"], expected[None]) < 2e-5
    (sample,) = events(sampled(client, stream=True, **body).text)
    assert (sample["index"], sample["seed"], sample["class_label"]) == (0, None, 3)
    picture = client.post("/v1/samples", json=body, headers={"Accept": "image/png"})
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(picture.content)).text == {"model": "digits", "class": "3"}
    np.testing.assert_array_equal(pixels(base64.b64encode(picture.content)), pixels(sample["b64_json"]))


def test_latents_go_with_a_program_of_the_request(client):
    expected = Sampler("digits", plan=amed_engine.Plan.from_json(fuzzed.PLAN)).run(noise(2), class_labels=1)
    got = as_npz(client, latents=packed(latents=noise(2)), class_labels=1, program={"plan": fuzzed.PLAN})
    assert largest(torch.as_tensor(got["images"]), expected.images) < 2e-5
    assert str(got["plan"]) == expected.plan.describe()


def test_several_latents_are_no_single_picture(client):
    body = {"latents": packed(latents=noise(2)), "class_labels": 3}
    assert told(client.post("/v1/samples", json=body, headers={"Accept": "image/png"}), 406)["param"] == "latents"


def test_latents_count_as_samples(client):
    error = told(client.post("/v1/samples", json={"latents": packed(latents=noise(9))}), 422)
    assert error["param"] == "latents"
    assert "may have 8" in error["message"]


def test_what_becomes_nan_is_named_by_its_row(prompted, asked):
    given = noise(2, *SHAPE)
    given[1] *= 3e38 / given[1].abs().max()  # finite, and beyond any network
    body = {"latents": packed(latents=given), "class_labels": 0, **PLAN}
    error = told(asked.post("/v1/samples", json=body), 500)
    assert error["code"] == "non_finite"
    assert "rows [1]" in error["message"]


def test_the_limit_of_a_body_is_that_of_its_tensors(prompted):
    with TestClient(make_app({"prompted": [prompted]}, limits=Limits(body=len(TEXT)))) as narrow:
        body = {"seeds": [1, 2, 3], "conditions": TEXT}
        assert told(narrow.post("/v1/samples", json=body), 413)["code"] == "too_large"
