"""The native file format: tensors as safetensors, everything else as one JSON object beside or inside them.

A path ending in .safetensors is one file, its configuration in the header's metadata under "amed_config"; any other path is
a directory of model.safetensors and config.json.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.solvers.files import atomic_write, write_or_stream
from amed_engine.solvers.targets import check_folder, check_target

CONFIG_KEY = "amed_config"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
PUBLISHED = (".pkl", ".pt", ".pth", ".ckpt")
HOW_TO_CONVERT = "if it is published, `amed convert {} --out NAME.safetensors` makes it so"
MAX_HEADER = 8 << 20  # bytes, a plan's mean answer among them; checked before anything is parsed
MAX_PREDICTOR = 64 << 20
OTHERS = (".pt", ".pth", ".pt2", ".ckpt", ".bin", ".pkl", ".json", ".txt", ".onnx")  # no names of a directory either
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_diffusers(model: Any, folder: Path) -> None:
    """Save a model of diffusers to its directory, each file whole or not at all, readable as the umask says."""
    with tempfile.TemporaryDirectory() as whole:
        model.save_pretrained(whole)
        for file in sorted(Path(whole).iterdir()):
            atomic_write(folder / file.name, file.read_bytes())


def load_diffusers(model_class: Any, folder: Path, what: str) -> Any:
    """The model in a directory that `save_diffusers` or diffusers wrote; safetensors only, nothing from the network."""
    try:
        return model_class.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{folder} holds no {what} of diffusers: {str(error)[:300]}") from error


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
    """Save tensors and their configuration to a .safetensors file or a directory, each file atomically.

    Raises ConfigError for a configuration that JSON cannot hold or the name of another kind of file, and OSError.
    """
    path = Path(path)
    _check_name(path)
    try:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the configuration is not JSON: {error}; notes must be text, finite numbers or lists"
        ) from error
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(tensors, metadata={CONFIG_KEY: text})
    if path.suffix == ".safetensors":
        write_or_stream(path, data)
        return
    atomic_write(path / WEIGHTS_FILE, data)
    atomic_write(path / CONFIG_FILE, text.encode() + b"\n")


def read(path: str | os.PathLike, max_bytes: int | None = None) -> tuple[dict, dict[str, Tensor]]:
    """(config, tensors) of a file or directory that `write` made. Raises FileFormatError, naming the file."""
    path = Path(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if file.suffix in PUBLISHED and file.is_file():
        raise FileFormatError(f"{file} is not in this package's format; {HOW_TO_CONVERT.format(file)}")
    metadata, tensors = read_tensors(file, max_bytes)
    beside = path / CONFIG_FILE
    text = _read_text(beside) if beside.is_file() else metadata.get(CONFIG_KEY)
    if text is None:
        raise FileFormatError(
            f"{file} has no configuration (config.json beside it or {CONFIG_KEY!r} in its metadata); "
            f"{HOW_TO_CONVERT.format(file)}"
        )
    for name, tensor in tensors.items():
        check_values(file, name, tensor)
    return parse_config(text, file), tensors


def read_tensors(file: Path, max_bytes: int | None = None) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file, whatever its name. Raises FileFormatError, naming the file."""
    _check_size(file, max_bytes)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    except safetensors.SafetensorError as error:
        raise FileFormatError(
            f"{file} is not a readable safetensors file: {error}; it is truncated or of another kind"
        ) from error


def read_config(folder: Path) -> dict:
    """The configuration beside the weights of a directory, without the weights."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileFormatError(f"{folder} has no {CONFIG_FILE}")
    return parse_config(_read_text(file), file)


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


def _check_size(file: Path, max_bytes: int | None) -> None:
    """Refuse what cannot be ours before reading it into memory."""
    if not file.is_file():
        raise FileFormatError(
            f"{file} does not exist or is not a file; pass a .safetensors file or a directory holding model.safetensors"
        )
    size = file.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise FileFormatError(f"{file} has {size} bytes, more than the {max_bytes} such a file may have")
    with open(file, "rb") as opened:
        start = opened.read(8)
    if len(start) < 8:
        raise FileFormatError(f"{file} is truncated: {size} bytes are no safetensors file")
    header = struct.unpack("<Q", start)[0]
    if header > MAX_HEADER:
        raise FileFormatError(
            f"{file}: its header claims {header} bytes, more than {MAX_HEADER}; it is damaged or of another kind"
        )
    if header + 8 > size:
        raise FileFormatError(f"{file} is truncated: its header claims {header} bytes of {size}")
