"""What a published file holds, or a folder, or the shards of an index: read by what is in it, whatever its name says."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor

from amed_engine.checkpoints.archives import DAMAGED, check_bound, load_restricted
from amed_engine.checkpoints.files import CONFIG_FILE, CONFIG_KEY, read_config, read_tensors
from amed_engine.checkpoints.plain_data import MAX_NAME
from amed_engine.checkpoints.policy import read_published
from amed_engine.errors import ConfigError, FileFormatError, UnsafeFileError
from amed_engine.solvers.files import read_json

INDEX = ".index.json"
WEIGHTS = re.compile(r"(diffusion_)?(pytorch_)?model(_\d+)?(\.\w+)?\.(safetensors|bin|pt|pth|ckpt)")
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")
LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the number that torch.save put first before it wrote archives
# Starts of files that are no checkpoints, some of which a pickle could have too.
STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; fetch the file itself: `git lfs pull`",
    b"\x93NUMPY": "an array of NumPy",
    b"\x89HDF": "of HDF5",
    b"GGUF": "of GGUF",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
}
# Archives that torch.save did not write, by an entry that they have.
ARCHIVES = {
    "constants.pkl": "a TorchScript program; pass it to Sampler, which runs it",
    "archive_format": "an exported program; name it .pt2 and pass it to Sampler, which runs it",
}
DEEPSPEED = "a checkpoint of DeepSpeed, in pieces; run the zero_to_fp32.py in it and convert what that writes"
DISTRIBUTED = (
    "a checkpoint of torch.distributed, in pieces; put it together first: "
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt"
)


class Contents(NamedTuple):
    """data: what was read, of types that only hold data. sources: the files it was read from."""

    data: Any
    sources: tuple[Path, ...]


def read_contents(path: Path, max_bytes: int | None = None) -> Contents:
    """Of a file (pickle, torch.save, safetensors), an index of shards, or a folder with one of these.

    max_bytes: what they may have together, unpacked; None: as many as the file has itself, or UNPACKED where that is more.
    Raises ConfigError where there is none, FileFormatError where it is of another kind or damaged, UnsafeFileError where it
    holds more than data.
    """
    if path.is_dir():
        return read_contents(_file_of(path), max_bytes)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist or is no file; pass a published checkpoint")
    with open(path, "rb") as file:
        start = file.read(64)
    if start.lstrip()[:1] == b"{" and not _is_safetensors(start):
        return _sharded(path, max_bytes)
    if (shard := SHARD.search(path.name)) and int(shard[1]) > 1:
        raise ConfigError(f"{path} is one of {int(shard[1])} shards; pass their index (*{INDEX}) or the folder")
    return Contents(_read(path, start, max_bytes), (path,))


def _is_safetensors(start: bytes) -> bool:
    """The length of a header in 8 bytes, little-endian, and the brace that it begins with."""
    return start[4:8] == bytes(4) and start[8:9] == b"{"


def _read(path: Path, start: bytes, max_bytes: int | None) -> Any:
    """A pickle by our own reader; what torch.save wrote by torch's, restricted to tensors."""
    check_bound(path, path.stat().st_size, max_bytes)
    if not start:
        raise UnsafeFileError(f"{path} is empty; fetch it again")
    if kind := next((kind for begin, kind in STARTS.items() if start.startswith(begin)), None):
        raise FileFormatError(f"{path} is no checkpoint but {kind}")
    if _is_safetensors(start):
        return _published_tensors(path)
    if start.startswith(b"PK"):
        _check_archive(path)
    elif LEGACY not in start[:16]:
        if _is_text(path):
            raise FileFormatError(
                f"{path} is no checkpoint but text; it begins with {start[:40].decode(errors='replace')!r}"
            )
        return read_published(path)
    try:
        with open(path, "rb") as file:  # of a path, torch would go by its name
            return load_restricted(file, path, max_bytes)
    except FileFormatError:
        raise
    except Exception as error:  # torch raises what its readers happen to raise
        raise UnsafeFileError(
            f"{path} is refused: {_reason(error)}; only tensors are read from such a file: save its state dict alone"
        ) from error


def _published_tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file that is not ours."""
    metadata, tensors = read_tensors(path)
    if CONFIG_KEY in metadata:
        raise ConfigError(f"{path} is in this package's format already and needs no conversion")
    if long := next((name for name in tensors if len(name) > MAX_NAME), None):
        raise FileFormatError(f"{path} has a tensor whose name, {long[:40]!r}..., has more than {MAX_NAME} characters")
    return tensors


def _reason(error: Exception) -> str:
    """What torch found; its message tells how to load that all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it names {named[1][:200]!r}"
    return next((line for line in lines if "nsupported" in line), lines[0])[:300]


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {PurePosixPath(name).name for name in archive.namelist()}
    except DAMAGED as error:
        raise FileFormatError(f"{path} is a damaged archive: {error}; it was cut off, fetch it again") from error
    if kind := next((kind for name, kind in ARCHIVES.items() if name in names), None):
        raise FileFormatError(f"{path} is no state dict but {kind}")
    if "data.pkl" not in names:
        raise FileFormatError(f"{path} is an archive that torch.save did not write: {', '.join(sorted(names)[:5])}")


def _is_text(path: Path) -> bool:
    """Whether a file is text, and no pickle of protocol 0, which is text as well."""
    with open(path, "rb") as file:
        start = file.read(512)
        try:
            if any(ord(char) < 32 and char not in "\t\r\n" for char in start.decode("utf-8")):
                return False
        except UnicodeDecodeError:
            return False
        file.seek(0)
        try:
            for _ in pickletools.genops(file):
                pass
        except Exception:  # whatever the standard library makes of what is no pickle
            return True
    return False


def _file_of(folder: Path) -> Path:
    """The one file in a folder that holds its weights. Raises ConfigError where there is none, or several."""
    _check_folder(folder)
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    found = [name for name in names if name.endswith(INDEX) or WEIGHTS.fullmatch(name)]
    if len(found) != 1:
        told = (
            f"several weights ({', '.join(found)})" if found else f"no weights ({', '.join(names[:10]) or 'nothing'})"
        )
        raise ConfigError(f"{folder} holds {told}; pass the file that is to be converted")
    return folder / found[0]


def _check_folder(folder: Path) -> None:
    """Raise ConfigError for folders that others read, or that are in pieces."""
    if (folder / "zero_to_fp32.py").exists() or any(folder.glob("*/*_model_states.pt")):
        raise ConfigError(f"{folder} is {DEEPSPEED}")
    if any(folder.glob("*.distcp")) or any(folder.glob("*/*.distcp")):
        raise ConfigError(f"{folder} is {DISTRIBUTED}")
    if (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder} is a pipeline of diffusers, which needs no conversion: amed_engine.wrap_pipeline")
    config = read_config(folder) if (folder / CONFIG_FILE).is_file() else {}
    if "_class_name" in config:
        raise ConfigError(f"{folder} is {needs_none(str(config['_class_name'])[:60])}")
    if "kind" in config and "amed_engine" in config:
        raise ConfigError(f"{folder} is in this package's format already and needs no conversion")


def needs_none(kind: str) -> str:
    return f"a {kind} of diffusers, which needs no conversion: load it with diffusers, and amed_engine.wrap it"


def _sharded(path: Path, max_bytes: int | None) -> Contents:
    """The tensors of all shards that an index names, each where the index says, and no others."""
    shards = read_json(path, _shards, f"index of shards (*{INDEX})", "pass the checkpoint itself")
    if missing := [each for each in shards if not (path.parent / each).is_file()]:
        raise FileFormatError(f"{path} names {len(shards)} shards, of which {', '.join(missing[:5])} are not there")
    files = {shard: path.parent / shard for shard in shards}
    check_bound(path, sum(file.stat().st_size for file in files.values()), max_bytes, "and its shards have")
    tensors: dict[str, Tensor] = {}
    for shard, names in shards.items():
        file = files[shard]
        with open(file, "rb") as opened:
            held = _read(file, opened.read(64), max_bytes)
        _check_shard(held, names, file, path)
        tensors |= held
    return Contents(tensors, (path, *(path.parent / shard for shard in shards)))


def _shards(data: Any) -> dict[str, set[str]]:
    """Shard -> names of its tensors. Raises ValueError."""
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError("it has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, shard in places.items():
        inside = PurePosixPath(shard) if isinstance(shard, str) else PurePosixPath("/")
        if inside.is_absolute() or ".." in inside.parts or "\\" in str(inside) or not inside.name:
            raise ValueError(f"the shard of {name[:80]!r} is {str(shard)[:80]!r}, expected a file beside the index")
        shards.setdefault(str(shard), set()).add(name)
    return shards


def _check_shard(held: Any, names: set[str], shard: Path, index: Path) -> None:
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise FileFormatError(f"{shard}, a shard of {index.name}, is no state dict of tensors")
    if absent := sorted(names - held.keys()):
        raise FileFormatError(f"{shard} lacks {absent[0]!r}, which {index.name} says is in it ({len(absent)} missing)")
    if others := sorted(map(str, held.keys() - names)):
        raise FileFormatError(
            f"{shard} holds {others[0]!r}, of which {index.name} does not speak ({len(others)} unexpected)"
        )
