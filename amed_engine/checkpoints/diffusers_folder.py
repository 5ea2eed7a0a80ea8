"""Directories of one model of diffusers, with the SHA-256 of tensors and configuration in the headers of its weights.

There they are no part of the configuration, which diffusers would keep, and write beside other weights. Directories that
diffusers wrote name none.
"""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.fingerprint import digest
from amed_engine.checkpoints.files import CONFIG_FILE, DIFFUSERS_FILE, MAX_HEADER, publish, read_config, read_tensors
from amed_engine.checkpoints.hashes import (
    KEY,
    NOT_OF_ONE_SAVE,
    TRACE,
    Hashes,
    MixedError,
    check_pair,
    check_tensors,
    found_in,
    named,
    of_config,
    settled,
)
from amed_engine.errors import FileFormatError
from amed_engine.solvers.files import read_json

INDEX_FILE = f"{DIFFUSERS_FILE}.index.json"


def save_diffusers(model: Any, folder: Path) -> Hashes:
    """Save a model of diffusers to its directory, each file whole or not at all, readable as the umask says; what it is."""
    with tempfile.TemporaryDirectory() as whole:
        model.save_pretrained(whole)
        return _published(Path(whole), folder)


def _published(whole: Path, folder: Path) -> Hashes:
    """Move a directory's files to their places, weights first and the configuration last."""
    files = _weights(whole)
    hashes = Hashes(of_config(read_config(whole)), digest(_tensors(files)))
    others = sorted(file for file in whole.iterdir() if file not in files and file.name != CONFIG_FILE)
    if not (whole / INDEX_FILE).is_file():  # of an earlier model, in pieces
        (folder / INDEX_FILE).unlink(missing_ok=True)
    publish((folder / file.name, _sealed(file, hashes)) for file in (*files, *others, whole / CONFIG_FILE))
    return hashes


def _sealed(file: Path, hashes: Hashes) -> bytes:
    """A file's bytes; of weights, with the hashes in their header."""
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return data
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {**header.get("__metadata__", {}), KEY: json.dumps(hashes._asdict())}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def load_diffusers(model_class: Any, folder: Path, what: str) -> Any:
    """The model in a directory that `save_diffusers` or diffusers wrote; safetensors only, nothing from the network.

    Raises FileFormatError where it is not what was saved, and where its files are still of different saves after a second.
    """
    return settled(lambda: read_diffusers(model_class, folder, what)[0])


def read_diffusers(model_class: Any, folder: Path, what: str) -> tuple[Any, Hashes | None]:
    """(the model, the hashes that its weights name). Raises MixedError."""
    files = _weights(folder)
    hashes = _named(files)
    config, tensors = ({}, {}) if hashes is None else _checked(folder, files, hashes)
    try:
        model = model_class.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{folder} holds no {what} of diffusers: {str(error)[:300]}") from error
    if hashes is not None and not _is_of(model, config, tensors):
        raise MixedError(f"{folder} was written while it was read: {NOT_OF_ONE_SAVE}")
    return model, hashes


def _weights(folder: Path) -> list[Path]:
    """The files of its weights that are there."""
    names = {DIFFUSERS_FILE}
    if (folder / INDEX_FILE).is_file():
        names = set(read_json(folder / INDEX_FILE, _shards, "index of shards", "save it again"))
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def _shards(data: Any) -> list[str]:
    names = data["weight_map"].values() if isinstance(data, dict) and isinstance(data.get("weight_map"), dict) else ()
    return [Path(name).name for name in names if isinstance(name, str)]


def _tensors(files: list[Path]) -> dict[str, Tensor]:
    return {name: tensor for file in files for name, tensor in read_tensors(file)[1].items()}


def _named(files: list[Path]) -> Hashes | None:
    """What the headers of all weights name; None for those of others. Raises FileFormatError, MixedError."""
    if not any(_has_trace(file) for file in files):
        return None
    said = {named(f'{{"{KEY}": {read_tensors(file)[0].get(KEY)}}}', file) for file in files}
    if len(said) > 1:
        raise MixedError(f"{files[0].parent} has weights of {len(said)} models: {NOT_OF_ONE_SAVE}")
    return said.pop()


def _has_trace(file: Path) -> bool:
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return TRACE.search(opened.read(min(size, MAX_HEADER)).decode("utf-8", "replace")) is not None


def _checked(folder: Path, files: list[Path], hashes: Hashes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors), those that were saved. Raises FileFormatError, MixedError."""
    config, tensors = read_config(folder), _tensors(files)
    check_pair(hashes.configuration, found_in(config), files[0], folder / CONFIG_FILE, "a configuration")
    check_tensors(tensors, hashes, files[0])
    return config, tensors


def _is_of(model: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    """Whether diffusers, which opens the files itself, found the same; it loads weights in a precision of its own."""
    told = {name: json.loads(json.dumps(model.config.get(name), default=str)) for name in config if name[0] != "_"}
    state = model.state_dict()
    return all(told[name] == config[name] for name in told) and all(
        name in state and torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in tensors.items()
    )
