"""Samples as a client gets them: PNG in JSON or alone, NumPy's .npz, safetensors."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
from fastapi import Response
from torch import Tensor

from amed_engine.engine.images import png, to_uint8
from amed_engine.engine.result import SampleResult
from amed_engine.serving.http.replies import JSON
from amed_engine.serving.order import Sample


def pictures(result: SampleResult, model: str) -> Response:
    """JSON in OpenAI's shape, and what else is known of the samples."""
    seeds, labels = _seeds(result), _classes(result.labels, len(result.images))
    drawn = to_uint8(result.images)
    data = [_picture(*each) for each in zip(drawn, seeds, labels, strict=True)]
    return JSON({"created": int(time.time()), "data": data, "model": model, **facts(result)})


def picture(result: SampleResult, model: str) -> Response:
    """A PNG file; its text chunks say model, seed and class."""
    (drawn,), (seed,), (label,) = to_uint8(result.images), _seeds(result), _classes(result.labels, 1)
    said = {"model": model, "seed": seed, "class": label}
    notes = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in said.items()
        if value is not None
    }
    return Response(png(drawn, notes), media_type="image/png")


def event(sample: Sample) -> dict[str, Any]:
    """One sample of a stream."""
    (drawn,) = to_uint8(sample.image[None])
    return {"index": sample.index, **_picture(drawn, sample.seed, _class(sample.label))}


def npz(result: SampleResult, model: str) -> Response:
    """images (B, C, H, W) float32, seeds (B,) int64 and labels where there are any, and each fact."""
    known = {"model": model, **facts(result)}
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in _tensors(result).items()}
    arrays |= {name: np.array(value) for name, value in known.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return Response(buffer.getvalue(), media_type="application/octet-stream")


def safetensors_file(result: SampleResult, model: str) -> Response:
    """The same tensors; the facts are its metadata, texts as they are and the others as JSON."""
    known = {"model": model, **facts(result)}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}
    return Response(safetensors.torch.save(_tensors(result), metadata=texts), media_type="application/octet-stream")


def facts(result: SampleResult) -> dict[str, Any]:
    """What ran. buckets: how many rows the network computed at once."""
    told = {"nfe": result.nfe, "plan": result.plan.describe(), "backend": result.backend}
    return {**told, "buckets": list(result.buckets), "seconds": result.seconds}


def _picture(drawn: np.ndarray, seed: int | None, label: Any) -> dict[str, Any]:
    return {"b64_json": base64.b64encode(png(drawn)).decode("ascii"), "seed": seed, "class_label": label}


def _tensors(result: SampleResult) -> dict[str, Tensor]:
    found = {"images": result.images.detach().to("cpu", torch.float32).contiguous()}
    if result.seeds is not None:
        found["seeds"] = torch.tensor(result.seeds, dtype=torch.int64, device="cpu")
    if result.labels is not None:
        found["labels"] = result.labels.cpu().contiguous()
    return found


def _seeds(result: SampleResult) -> Sequence[int | None]:
    """None of each where latents were given."""
    return [None] * len(result.images) if result.seeds is None else result.seeds


def _classes(labels: Tensor | None, count: int) -> list[Any]:
    return [None] * count if labels is None else [_class(label) for label in labels]


def _class(label: Any) -> Any:
    """A class, or numbers, as JSON has them."""
    return label.tolist() if isinstance(label, Tensor) else label
