"""The native file format: tensors as safetensors, everything else as one JSON object beside or inside them.

A path ending in .safetensors is one file, its configuration in the header's metadata under "amed_config"; any other path is
a directory of model.safetensors and config.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from amed_engine.adapters.fingerprint import digest
from amed_engine.checkpoints.hashes import (
    KEY,
    NOT_OF_ONE_SAVE,
    Hashes,
    MixedError,
    check_config,
    check_pair,
    check_tensors,
    named,
    settled,
    signed,
)
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.solvers.files import write_or_stream
from amed_engine.solvers.targets import check_folder, check_target, resolved
from amed_engine.solvers.temporary import Temporary, sweep

CONFIG_KEY = "amed_config"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
PUBLISHED = (".pkl", ".pt", ".pth", ".ckpt")
HOW_TO_CONVERT = "if it is published, `amed convert {} --out NAME.safetensors` makes it so"
MAX_HEADER = 8 << 20  # bytes, a plan's mean answer among them; checked before anything is parsed
MAX_PREDICTOR = 64 << 20
OTHERS = (".pt", ".pth", ".pt2", ".ckpt", ".bin", ".pkl", ".json", ".txt", ".onnx")  # no names of a directory either
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_savable(path: str | os.PathLike) -> None:
    """Before the work: whether `write` can write to a .safetensors file, a device or a FIFO of that name, or a directory.

    Raises ConfigError for the name of another kind of file and for what cannot be replaced, and OSError.
    """
    path = Path(path)
    _check_name(path)
    if path.suffix == ".safetensors":
        check_target(path, streams=True)
    else:
        check_folder(path, WEIGHTS_FILE, CONFIG_FILE)


def _check_name(path: Path) -> None:
    if path.suffix in OTHERS and not path.is_dir():
        raise ConfigError(
            f"{path} has the name of another kind of file; name it {path.stem}.safetensors, or give a directory"
        )


def write(path: str | os.PathLike, tensors: dict[str, Tensor], config: dict) -> None:
    """Save tensors and their configuration, which names the SHA-256 of both, to a .safetensors file or a directory.

    A file appears whole or not at all; of a directory the configuration appears last. Raises ConfigError for a configuration
    that JSON cannot hold or the name of another kind of file, and OSError.
    """
    path = Path(path)
    _check_name(path)
    packed = pack(tensors, config)
    if path.suffix == ".safetensors":
        write_or_stream(path, packed.data)
    else:
        publish([(path / WEIGHTS_FILE, packed.data), (path / CONFIG_FILE, packed.text.encode())])


class Packed(NamedTuple):
    """A file's bytes, the text of its configuration, and the SHA-256 of its tensors."""

    data: bytes
    text: str
    sha256: str


def pack(tensors: dict[str, Tensor], config: dict) -> Packed:
    """What `write` writes. Raises ConfigError for a configuration that JSON cannot hold."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sha256 = digest(tensors)
    text = config_text(config, sha256)
    return Packed(safetensors.torch.save(tensors, metadata={CONFIG_KEY: text}), text, sha256)


def config_text(config: dict, tensors: str) -> str:
    """The configuration as JSON with its SHA-256 and that of the tensors. Raises ConfigError for what JSON cannot hold."""
    try:
        plain = json.loads(json.dumps(config, indent=2, allow_nan=False))  # tuples as the lists a file gives back
        return json.dumps(signed(plain, tensors), indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the configuration is not JSON: {error}; notes must be text, finite numbers or lists"
        ) from error


def publish(files: Iterable[tuple[Path, bytes]]) -> None:
    """Write files of one folder, all on the disk before the first of them appears; they appear in their order."""
    with contextlib.ExitStack() as stack:
        made = []
        for path, data in files:
            made.append(stack.enter_context(Temporary(resolved(path))))
            made[-1].path.write_bytes(data)
            made[-1].flush()
        for temporary in made:
            temporary.publish()
    for temporary in made:
        with contextlib.suppress(PermissionError):  # another user's
            sweep(temporary.target.parent, temporary.target.name)  # of writers that were killed


def read(path: str | os.PathLike, max_bytes: int | None = None) -> tuple[dict, dict[str, Tensor]]:
    """(config, tensors) of a file or directory that `write` made. Raises FileFormatError, naming the file: where it was changed
    since, and where a directory's files are still of different saves after a second."""
    path = Path(path)
    if path.is_dir():
        return settled(lambda: _read_folder(path, max_bytes))
    config, tensors, _ = read_file(path, max_bytes)
    return config, tensors


def read_file(file: Path, max_bytes: int | None = None) -> tuple[dict, dict[str, Tensor], Hashes | None]:
    """(config, tensors, the hashes that it names) of a single file. Raises FileFormatError."""
    metadata, tensors = _opened(file, max_bytes)
    config, said = _told(_own_text(metadata, file), file)
    _check(file, tensors, said)
    return config, tensors, said


def _read_folder(path: Path, max_bytes: int | None) -> tuple[dict, dict[str, Tensor]]:
    """Raises MixedError where the weights are not those that the configuration is for."""
    file, beside = path / WEIGHTS_FILE, path / CONFIG_FILE
    if not beside.is_file():
        return read_file(file, max_bytes)[:2]
    config, said = _told(_read_text(beside), beside)
    metadata, tensors = _opened(file, max_bytes)
    own = named(metadata.get(CONFIG_KEY, ""), file)
    if said is None and own is not None:
        raise MixedError(f"{beside} names no SHA-256, but {file} has {own.tensors}: {NOT_OF_ONE_SAVE}")
    if said is not None:
        check_pair(said.tensors, digest(tensors) if own is None else own.tensors, beside, file)
    _check(file, tensors, said)
    return config, tensors


def _opened(file: Path, max_bytes: int | None) -> tuple[dict[str, str], dict[str, Tensor]]:
    if file.suffix in PUBLISHED and file.is_file():
        raise FileFormatError(f"{file} is not in this package's format; {HOW_TO_CONVERT.format(file)}")
    return read_tensors(file, max_bytes)


def _own_text(metadata: dict[str, str], file: Path) -> str:
    if CONFIG_KEY not in metadata:
        raise FileFormatError(
            f"{file} has no configuration (config.json beside it or {CONFIG_KEY!r} in its metadata); "
            f"{HOW_TO_CONVERT.format(file)}"
        )
    return metadata[CONFIG_KEY]


def _told(text: str, file: Path) -> tuple[dict, Hashes | None]:
    """(configuration without the hashes, the hashes that it names, if it does). Raises FileFormatError."""
    config, said = parse_config(text, file), named(text, file)
    if said is not None:
        check_config(config, said, file)
    return {name: value for name, value in config.items() if name != KEY}, said


def _check(file: Path, tensors: dict[str, Tensor], said: Hashes | None) -> None:
    for name, tensor in tensors.items():
        check_values(file, name, tensor)
    if said is not None:
        check_tensors(tensors, said, file)


def read_tensors(file: Path, max_bytes: int | None = None) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file, whatever its name. Raises FileFormatError, naming the file."""
    if not file.is_file():
        raise FileFormatError(
            f"{file} does not exist or is not a file; pass a .safetensors file or a directory holding model.safetensors"
        )
    with open(file, "rb") as handle:
        return held_tensors(file, handle, max_bytes)


def held_tensors(
    file: Path, handle: BinaryIO, max_bytes: int | None = None
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The same of an open file, whatever its name is by now."""
    _check_size(file, handle, max_bytes)
    try:
        # safetensors opens a name twice, for the header and for the values.
        with safetensors.safe_open(name_of(file, handle), framework="pt") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    except safetensors.SafetensorError as error:
        raise FileFormatError(
            f"{file} is not a readable safetensors file: {error}; it is truncated or of another kind"
        ) from error


def shapes_of(file: Path) -> list[torch.Size]:
    """Of the tensors in a safetensors file, by its header alone. Raises SafetensorError."""
    with safetensors.safe_open(file, framework="pt") as opened:
        return [torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118  (not a dict)


def name_of(file: Path, handle: BinaryIO) -> Path:
    """A name by which an open file can be opened again, though another may have taken its own."""
    same = Path(f"/dev/fd/{handle.fileno()}")
    return same if same.exists() else file


def read_config(folder: Path) -> dict:
    """The configuration beside the weights of a directory, without the weights."""
    return read_signed_config(folder)[0]


def read_signed_config(folder: Path) -> tuple[dict, Hashes | None]:
    """The same, and the hashes that it names."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileFormatError(f"{folder} has no {CONFIG_FILE}")
    return _told(_read_text(file), file)


def _read_text(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_HEADER:
        raise FileFormatError(f"{file} has {size} bytes, more than the {MAX_HEADER} a configuration may have")
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{file}: configuration is not UTF-8 text: {error}") from error


def check_values(file: Path, name: str, tensor: Tensor) -> None:
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "no values: it was saved from the meta device" if tensor.is_meta else f"the layout {tensor.layout}"
        raise FileFormatError(f"{file}: tensor {name!r} has {kind}; save it again, dense and with its values")
    if not tensor.is_floating_point():
        return
    if tensor.dtype not in FLOATS:
        raise FileFormatError(f"{file}: tensor {name!r} has dtype {tensor.dtype}, expected one of {FLOATS}")
    if not bool(torch.isfinite(tensor).all()):
        raise FileFormatError(f"{file}: tensor {name!r} holds NaN or infinite values")


def parse_config(text: str, file: Path) -> dict:
    try:
        config = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file}: configuration is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise FileFormatError(f"{file}: configuration must be a JSON object, got {type(config).__name__}")
    return config


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _check_size(file: Path, handle: BinaryIO, max_bytes: int | None) -> None:
    """Refuse what cannot be ours before reading it into memory."""
    size = os.fstat(handle.fileno()).st_size
    if max_bytes is not None and size > max_bytes:
        raise FileFormatError(f"{file} has {size} bytes, more than the {max_bytes} such a file may have")
    start = handle.read(8)
    if len(start) < 8:
        raise FileFormatError(f"{file} is truncated: {size} bytes are no safetensors file")
    header = struct.unpack("<Q", start)[0]
    if header > MAX_HEADER:
        raise FileFormatError(
            f"{file}: its header claims {header} bytes, more than {MAX_HEADER}; it is damaged or of another kind"
        )
    if header + 8 > size:
        raise FileFormatError(f"{file} is truncated: its header claims {header} bytes of {size}")
