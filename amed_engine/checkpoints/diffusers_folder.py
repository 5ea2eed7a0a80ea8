"""Directories of one model of diffusers, with the SHA-256 of tensors and configuration in the headers of its weights.

There they are no part of the configuration, which diffusers would keep, and write beside other weights. Directories that
diffusers wrote name none.
"""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from amed_engine.adapters.fingerprint import digest
from amed_engine.checkpoints.files import (
    CONFIG_FILE,
    DIFFUSERS_FILE,
    MAX_HEADER,
    held_tensors,
    name_of,
    publish,
    read_config,
    read_tensors,
    shapes_of,
)
from amed_engine.checkpoints.fit import check_numbers, check_types, without_memory
from amed_engine.checkpoints.hashes import (
    KEY,
    NOT_OF_ONE_SAVE,
    TRACE,
    Hashes,
    Loaded,
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
    return save_by(model.save_pretrained, folder)


def save_by(save: Callable[[str], Any], folder: Path) -> Hashes:
    """The same of what `save` writes to the directory that it is given."""
    with tempfile.TemporaryDirectory() as whole:
        save(whole)
        return _published(Path(whole), folder)


def _published(whole: Path, folder: Path) -> Hashes:
    """Move a directory's files to their places, weights first and the configuration last."""
    files = [whole / name for name in _weights(whole)[1]]
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file)[1].items()}
    hashes = Hashes(of_config(read_config(whole)), digest(tensors))
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
    return load_by(lambda same: open_diffusers(model_class, same, folder, what), folder)


def load_by(load: Callable[[Path], Loaded], folder: Path) -> Loaded:
    """What `load` makes of the directory of the same files."""

    def held_and_loaded() -> Loaded:
        with held(folder) as (same, _):
            return load(same)

    return settled(held_and_loaded)


def open_diffusers(model_class: Any, same: Path, folder: Path, what: str) -> Any:
    """same: what `held` gives for the folder."""
    try:
        _check_fit(model_class, same)
        model = model_class.from_pretrained(same, local_files_only=True, use_safetensors=True).eval()
    except Exception as error:  # diffusers raises what its constructors happen to make of a configuration
        raise FileFormatError(f"{folder} holds no {what} of diffusers: {str(error)[:300]}") from error
    return keep_name(model, folder)


def _check_fit(model_class: Any, same: Path) -> None:
    """Raises ConfigError where the configuration asks for more than the files hold, which diffusers would make up."""
    shapes = [shape for name in _weights(same)[1] for shape in shapes_of(same / name)]
    if shapes and (same / CONFIG_FILE).is_file():  # of what is missing diffusers speaks
        check_types(model_class, config := read_config(same))
        check_numbers(without_memory(lambda: model_class.from_config(config), len(shapes)), shapes)


def keep_name(model: Any, folder: Path) -> Any:
    """Have diffusers say that the model is from this folder."""
    model.register_to_config(_name_or_path=str(folder))
    return model


@contextlib.contextmanager
def held(folder: Path) -> Iterator[tuple[Path, Hashes | None]]:
    """(a folder of the same files, the hashes that its weights name): files that were checked, and that stay what they are
    while diffusers opens them by their names. The folder itself where no hashes are named.

    Raises FileFormatError where they were changed since they were saved, MixedError.
    """
    with contextlib.ExitStack() as stack:
        index, names = _weights(folder)
        files = {folder / name: stack.enter_context(open(folder / name, "rb")) for name in names}
        if not any(_has_trace(handle) for handle in files.values()):
            yield folder, None
            return
        contents = {file: held_tensors(file, handle) for file, handle in files.items()}
        hashes = _named({file: metadata for file, (metadata, _) in contents.items()})
        config, first = read_config(folder), next(iter(files))
        check_pair(hashes.configuration, found_in(config), first, folder / CONFIG_FILE, "a configuration")
        check_tensors(
            {name: value for _, tensors in contents.values() for name, value in tensors.items()}, hashes, first
        )
        same = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for file, handle in files.items():
            (same / file.name).symlink_to(name_of(file, handle))
        for name, data in ((INDEX_FILE, index), (CONFIG_FILE, json.dumps(config))):
            if data:
                (same / name).write_text(data)
        yield same, hashes


def _weights(folder: Path) -> tuple[str, list[str]]:
    """(text of the index, "" where there is none, names of the files of its weights that are there)"""
    index, names = folder / INDEX_FILE, {DIFFUSERS_FILE}
    text = ""
    if index.is_file():
        data = read_json(index, lambda data: data, "index of shards", "save it again")
        places = data.get("weight_map") if isinstance(data, dict) else None
        names = {str(name) for name in places.values()} if isinstance(places, dict) else names
        text = json.dumps(data)
    return text, sorted(name for name in names if Path(name).name == name and (folder / name).is_file())


def _has_trace(handle: BinaryIO) -> bool:
    size = int.from_bytes(handle.read(8), "little")
    start = handle.read(min(size, MAX_HEADER))
    handle.seek(0)
    return TRACE.search(start.decode("utf-8", "replace")) is not None


def _named(headers: dict[Path, dict[str, str]]) -> Hashes:
    """What the headers of all weights name. Raises FileFormatError, MixedError."""
    said = {named(f'{{"{KEY}": {metadata.get(KEY)}}}', file) for file, metadata in headers.items()}
    if len(said) > 1:
        raise MixedError(f"{next(iter(headers)).parent} has weights of {len(said)} models: {NOT_OF_ONE_SAVE}")
    return cast(Hashes, said.pop())
