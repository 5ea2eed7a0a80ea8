"""Tensors in requests that are refused, each by its key, and damaged files, which are no error of the server."""

import base64
import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prompted import NONE, PLAN, SHAPE, prompts
from served import packed, told

pytest.importorskip("fastapi", reason="fastapi is not installed")

import fuzzed
import prompted as conditioned

PROMPT = prompts()
LATENTS = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
FILES = {"conditions": safetensors.torch.save(PROMPT), "latents": safetensors.torch.save({"latents": LATENTS})}
engine, client = fuzzed.engine, fuzzed.client  # of digits
prompted, asked = conditioned.prompted, conditioned.asked


def body_of(key, text):
    """A request of three samples that has this file."""
    return {key: text, **({"seeds": [1, 2, 3]} if key == "conditions" else {"class_labels": 0}), **PLAN}


def encoded(data):
    return base64.b64encode(data).decode()


def file(header, data=b""):
    """A .safetensors file by its parts, whatever they say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(dtype="F32", shape=(1,), size=4, name="latents", **more):
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size], **more}}


ONE = json.dumps(one()["latents"]).encode()
WRONG_FILES = {
    "nothing": (b"", "is empty"),
    "no header": (b"abc", "no .safetensors file"),
    "pickle": (b"\x80\x04N.", "no .safetensors file"),
    "no JSON": (file(b"{"), "no .safetensors file"),
    "no UTF-8": (file(b'{"\xff": 1}'), "no .safetensors file"),
    "an array": (file(b"[]"), "no .safetensors file"),
    "nested": (file(b"[" * 9000 + b"]" * 9000), "no .safetensors file"),
    "NaN": (file(b'{"a": NaN}'), "NaN is not a finite number"),
    "a claim": (struct.pack("<Q", 1 << 62) + b"{}", "header claims"),
    "a long header": (file(b"{}".ljust((64 << 10) + 1)), "more than the 65536"),
    "a header beyond the file": (struct.pack("<Q", 999) + b"{}", "no .safetensors file"),
    "cut": (FILES["latents"][:-1], "no .safetensors file"),
    "too long": (FILES["latents"] + b"\0", "no .safetensors file"),
    "twice": (file(b'{"latents":' + ONE + b',"latents":' + ONE + b"}", bytes(4)), "names an entry twice"),
    "overlapping": (file({**one(), **one(name="b")}, bytes(4)), "no .safetensors file"),
    "a size": (file(one(shape=(-1,)), bytes(4)), "no .safetensors file"),
    "a shape that overflows": (file(one(shape=(1 << 40, 1 << 40)), bytes(4)), "no .safetensors file"),
    "no tensors": (file({}), "holds no tensors"),
    "empty": (file(one(shape=(0, 4), size=0)), "is empty"),
    "empty and huge": (file(one(shape=(0, 1 << 62, 1 << 62), size=0)), "is empty"),
    "many dimensions": (file(one(shape=[1] * 5000), bytes(4)), "has 5000 dimensions"),
    "complex": (file(one("C64", size=8), bytes(8)), "is of type C64"),
    "float8": (file(one("F8_E4M3", size=1), bytes(1)), "is of type F8_E4M3"),
    "uint32": (file(one("U32"), bytes(4)), "is of type U32"),
    "no truth": (file(one("BOOL", size=1), b"\7"), "no truth values"),
}


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize(("data", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_what_is_no_file_of_tensors_is_refused(asked, prompted, key, data, message):
    before = prompted.stats().admitted
    error = told(asked.post("/v1/samples", json=body_of(key, encoded(data))), 422)
    assert (error["code"], error["param"]) == ("invalid_value", key)
    assert message in error["message"]
    assert len(error["message"]) < 500
    assert prompted.stats().admitted == before


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("text", ["!", "é", "AAA", "AA\nAA", 3, [], {"text": [1]}])
def test_what_is_no_base64_is_refused(asked, key, text):
    assert told(asked.post("/v1/samples", json=body_of(key, text)), 422)["param"] == key


WRONG_CONDITIONS = {
    "one is missing": ({"text": PROMPT["text"]}, "lack mask"),
    "unknown": ({**PROMPT, "noise": torch.ones(1)}, "hold noise"),
    "a long name": ({**PROMPT, "x" * 9000: torch.ones(1)}, "hold xxx"),
    "rows": ({name: value[:2] for name, value in PROMPT.items()}, "2 rows for a batch of 3"),
    "length": ({**PROMPT, "text": torch.zeros(1, 9, 6)}, "this engine's are (5, 6)"),
    "two lengths": (
        {"text": torch.zeros(1, 9, 6), "mask": torch.ones(1, 9)},
        "condition 'mask' has rows of shape (9,)",
    ),
    "rank": ({**PROMPT, "text": torch.zeros(6)}, "must be a tensor with a row per prompt"),
    "no rank": ({**PROMPT, "text": torch.tensor(1.0)}, "must be a tensor with a row per prompt"),
    "integers": ({**PROMPT, "mask": PROMPT["mask"].long()}, "torch.int64"),
    "truth values": ({**PROMPT, "mask": PROMPT["mask"] > 0}, "torch.bool"),
    "NaN": ({**PROMPT, "mask": PROMPT["mask"] / 0}, "NaN"),
    "beyond float32": ({**PROMPT, "text": PROMPT["text"].double() * 1e300}, "torch.float32 does not hold"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG_CONDITIONS.values(), ids=WRONG_CONDITIONS)
def test_conditions_that_the_model_does_not_take_are_refused(asked, tensors, message):
    error = told(asked.post("/v1/samples", json=body_of("conditions", packed(**tensors))), 422)
    assert error["param"] == "conditions"
    assert message in error["message"]
    assert len(error["message"]) < 500


WRONG_LATENTS = {
    "another name": ({"noise": LATENTS}, 'named "latents"'),
    "two": ({"latents": LATENTS, "more": torch.ones(1)}, 'named "latents"'),
    "one sample": ({"latents": LATENTS[0]}, "(B, 1, 4, 4)"),
    "another size": ({"latents": LATENTS[..., :2].contiguous()}, "(B, 1, 4, 4)"),
    "half": ({"latents": LATENTS.half()}, "torch.float32"),
    "double": ({"latents": LATENTS.double()}, "torch.float32"),
    "integers": ({"latents": LATENTS.long()}, "torch.float32"),
    "NaN": ({"latents": LATENTS / 0}, "rows [0, 1, 2]"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG_LATENTS.values(), ids=WRONG_LATENTS)
def test_latents_that_the_model_does_not_take_are_refused(asked, tensors, message):
    error = told(asked.post("/v1/samples", json=body_of("latents", packed(**tensors))), 422)
    assert error["param"] == "latents"
    assert message in error["message"]


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"seeds": [1, 2, 3]}, "seeds", "exclude each other"),
        ({"n": 2}, "n", "latents are 3"),
        ({"conditions": packed(**PROMPT)}, None, "not both"),  # beside class_labels
        ({"class_labels": [0, 1]}, None, "class_labels"),
        ({"guidance_scale": "2"}, "guidance_scale", "a number"),
    ],
)
def test_what_does_not_go_with_latents_is_refused(asked, more, param, message):
    error = told(asked.post("/v1/samples", json={**body_of("latents", encoded(FILES["latents"])), **more}), 422)
    assert error["param"] == param
    assert message in error["message"]


def test_a_model_that_takes_no_conditions_refuses_them(client):
    error = told(client.post("/v1/samples", json={"seeds": [1], "conditions": packed(**NONE)}), 422)
    assert error["param"] == "conditions"
    assert "takes none" in error["message"]


def test_pictures_in_words_have_no_tensors(client):
    for key in FILES:
        body = {"prompt": "", key: encoded(FILES[key])}
        error = told(client.post("/v1/images/generations", json=body), 422)
        assert (error["code"], error["param"]) == ("unknown_key", key)


# ---- damaged files

EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), st.integers(0, 1 << 16), st.integers(0, 255)),
    max_size=3,
)


def damaged(data, edits):
    data = bytearray(data)
    for kind, place, value in edits:
        place %= max(1, len(data))
        if kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = bytes([value])
        else:
            data[place : place + 1] = bytes([value] if kind == "set" else [])
    return bytes(data)


def is_huge(data):
    """Whether it holds what is finite and lets any network overflow."""
    return max(float(value.double().abs().max()) for value in safetensors.torch.load(data).values()) > 1e9


@pytest.mark.parametrize("key", FILES)
def test_no_damaged_file_is_an_error_of_the_server(asked, key):
    statuses = set()

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(EDITS)
    @example([])
    @example([("cut", 20, 0)])
    def send(edits):
        data = damaged(FILES[key], edits)
        answer = asked.post("/v1/samples", json={**body_of(key, encoded(data)), "format": "npz"})
        statuses.add(answer.status_code)
        if answer.status_code == 500:
            assert told(answer, 500)["code"] == "non_finite"
            assert is_huge(data)
        elif answer.status_code != 200:
            told(answer, 422)

    send()
    assert {200, 422} <= statuses
