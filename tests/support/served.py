"""Requests to a server that serves digits with 5 evaluations, of every kind at once, and the engine's answers to them."""

import base64
import io

import numpy as np
from PIL import Image

from amed_engine import Sampler
from amed_engine.engine.images import to_uint8

PAYLOADS = [
    {"seeds": [3, 4], "class_labels": 7},
    {"seeds": [5]},
    {"seeds": [6], "class_labels": [11]},  # of ten
    {"seeds": [8, 9], "class_labels": [1, 2], "nfe": 3},
    {"seeds": [10], "nfe": 10, "solver": "euler"},
    {"seeds": [11], "class_labels": 4, "guidance_scale": 2.0},
    {"seeds": [12, 13], "class_labels": 2, "nfe": 7, "solver": "unipc", "guidance_scale": 1.5},
    {"seeds": [14], "solver": "dpmpp", "priority": 2, "deadline": 600},
    {"seeds": [15], "solver": "nope"},
    {"seeds": [2], "nfe": 0},
]
WRONG = {2: "0 .. 9", 8: "unknown solver 'nope'", 9: "nfe must be an integer from 1"}


def expected():
    """The images of each of PAYLOADS, as `Sampler.run` draws them alone; None for those that are WRONG."""
    return [None if i in WRONG else _drawn(**payload) for i, payload in enumerate(PAYLOADS)]


def _drawn(seeds, class_labels=None, nfe=5, solver=None, guidance_scale=None, **_):
    return Sampler("digits", nfe=nfe, solver=solver, device="cpu").run(seeds, class_labels, guidance_scale).images


def pictures(answered) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in answered["images"]])


def same_pictures(answered, images) -> bool:
    """To one grey level: another batch may round a pixel the other way."""
    return int(np.abs(pictures(answered).astype(int) - to_uint8(images)[..., 0].astype(int)).max()) <= 1


def live_rows(before: dict, after: dict) -> float:
    """How many rows a tick had in the mean, from an engine's stats before and after."""
    return (after["evaluations"] - before["evaluations"]) / (after["ticks"] - before["ticks"])
