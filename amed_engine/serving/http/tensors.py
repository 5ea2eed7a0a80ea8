"""Tensors inside a request, a .safetensors file in base64: read in memory, and bounded before anything is made of it."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import safetensors
import torch
from torch import Tensor

from amed_engine.engine.request import check_latents
from amed_engine.errors import ConfigError
from amed_engine.serving.engine import ContinuousSampler
from amed_engine.serving.http import bodies
from amed_engine.serving.http.schemas import refusal
from amed_engine.solvers.arguments import told
from amed_engine.solvers.files import parse_json

HEADER = 64 << 10  # bytes of names, types and shapes, each of which becomes an object of many more
DIMS = 8
LONGEST = 300  # characters of what is told of a file, whose names may be as long as its header
# What engines compute with; of the format's others, torch adds or compares some on no device.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def conditions(text: str, engine: ContinuousSampler, samples: int) -> dict[str, Tensor]:
    """Of so many samples, (1 or B, ...) by name, on the host. Raises Refusal.

    They have the shapes that the engine knows: those of a first request would become everybody's, and room for all rows.
    """
    given, room = _read("conditions", text), engine.conditions
    if room is None:
        raise refusal("conditions", "conditions: this model takes none; leave them out")
    if not room.rows:
        message = "conditions: their shapes are not known to this server yet; whoever runs it binds some, or submits the first"
        raise refusal("conditions", message)
    try:
        room.check(given, samples, guided=False)
    except ConfigError as error:
        raise refusal("conditions", str(error)[:LONGEST]) from error
    return given


def latents(text: str, engine: ContinuousSampler) -> Tensor:
    """(B, C, H, W), or of the model's rank, of the engine's dtype and on its device. Raises Refusal."""
    given = _read("latents", text)
    if list(given) != ["latents"]:
        raise refusal("latents", f'latents must hold one tensor, named "latents", got {told(list(given))}')
    try:
        checked = check_latents(given["latents"], engine.model, engine.dtype, torch.device("cpu"), True)
    except ConfigError as error:
        raise refusal("latents", str(error)[:LONGEST]) from error
    return checked.to(engine.device)


def _read(param: str, text: str) -> dict[str, Tensor]:
    """By name, none of them empty. Raises Refusal."""
    data = bodies.decoded(param, text)
    if not data:
        raise refusal(param, f"{param} is empty, expected a .safetensors file in base64; leave it out")
    try:
        _check_header(data)
        entries = safetensors.deserialize(data)
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        what = f"{param}: no .safetensors file: {str(error)[:LONGEST]}; send all that safetensors' save writes"
        raise refusal(param, what) from error
    if not entries:
        raise refusal(param, f"{param}: the file holds no tensors")
    # Sorted: safetensors has them in another order each time, and which of several faults is told would differ.
    return {
        name: _tensor(f"{param}: tensor {told(name)}", param, entry)
        for name, entry in sorted(entries, key=itemgetter(0))
    }


def _check_header(data: bytes) -> None:
    """What safetensors does not: that it is small, and names no tensor twice. Raises ValueError and RecursionError."""
    size = int.from_bytes(data[:8], "little")
    if size > HEADER:
        raise ValueError(f"its header claims {size} bytes, more than the {HEADER} that it may have")
    parse_json(data[8 : 8 + size].decode("utf-8"))


def _tensor(named: str, param: str, entry: dict[str, Any]) -> Tensor:
    """Raises Refusal."""
    dtype, shape, data = DTYPES.get(entry["dtype"]), entry["shape"], entry["data"]
    if dtype is None:
        raise refusal(param, f"{named} is of type {entry['dtype']}, expected one of {', '.join(DTYPES)}; convert it")
    if len(shape) > DIMS or not data:  # of an empty one, the sizes may be anything
        what = "is empty" if not data else f"has {len(shape)} dimensions"
        raise refusal(
            param, f"{named} {what}, expected a row for each sample or one for all, and at most {DIMS} dimensions"
        )
    if dtype == torch.bool and max(data) > 1:
        raise refusal(param, f"{named} holds bytes that are no truth values; write 0 or 1")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)
