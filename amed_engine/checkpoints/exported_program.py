"""Reading ExportedPrograms without unpickling: torch's own reader falls back to pickle wherever an archive asks for it."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import torch

from amed_engine.adapters.sealed import check_seal
from amed_engine.checkpoints.archives import check_archive, load_restricted
from amed_engine.checkpoints.files import MAX_HEADER
from amed_engine.errors import FileFormatError
from amed_engine.sampling.modes import plain_defaults
from amed_engine.solvers.targets import check_source

MAX_CONFIG = 64 * MAX_HEADER  # an entry per tensor
# Files of constants that are no tensors: scripted objects and pickled ones.
_OBJECTS = ("custom_obj_", "opaque_obj_", "script_obj_")


def load_program(path: str | os.PathLike, *, verify: bool = True) -> torch.export.ExportedProgram:
    """The program in a .pt2 that `torch.export.save` wrote; its tensors are plain bytes and its graph is JSON.

    verify: compare the file with the hash in it, if there is one; it is read once more for that. Raises FileFormatError for any
    other file, and for one with parts that torch would unpickle.
    """
    path = Path(path)
    check_source(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path)
        if verify:
            check_seal(path)
        with plain_defaults():  # torch makes the weights as new tensors first
            return torch.export.load(path)
    except FileFormatError:
        raise
    except Exception as error:  # the readers raise what their parts happen to raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileFormatError(f"{path} is no readable ExportedProgram: {reason}") from error


def extra_names(path: str | os.PathLike) -> list[str]:
    """The names of the extra files in a .pt2; none where it is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.split("/extra/", 1)[1] for name in archive.namelist() if "/extra/" in name]
    except Exception:  # as above
        return []


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse what makes torch.export.load unpickle, and names that two readers could resolve differently."""
    infos = check_archive(archive, path)
    roots, names = zip(*(info.filename.split("/", 1) for info in infos), strict=True)
    if len(set(roots)) != 1 or len({name.lower() for name in names}) != len(names):
        raise FileFormatError(f"{path}: its entries do not share one folder, or a name is there twice; it is damaged")
    if "archive_format" not in names or archive.read(infos[names.index("archive_format")]) != b"pt2":
        raise FileFormatError(f"{path} is not in torch's PT2 format; write it with torch.export.save of torch >= 2.9")
    if any(name.startswith("data/aotinductor") for name in names):
        raise FileFormatError(f"{path} holds native code; if you trust it, open it with amed_engine.load_package")
    for info, name in zip(infos, names, strict=True):
        if name.startswith("data/") and name.endswith("_config.json"):
            _check_tensors(archive, info, path)
        if name.startswith("data/sample_inputs/"):
            _check_inputs(archive.read(info), path)


def _check_tensors(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    if info.file_size > MAX_CONFIG:
        raise FileFormatError(f"{path}: {info.filename} has {info.file_size} bytes, more than {MAX_CONFIG}")
    for name, payload in json.loads(archive.read(info))["config"].items():
        if payload["use_pickle"] is not False or payload["path_name"].startswith(_OBJECTS):
            raise FileFormatError(
                f"{path}: {name!r} is stored as a pickle, which could run code; export a model of plain tensors"
            )


def _check_inputs(data: bytes, path: Path) -> None:
    try:
        load_restricted(io.BytesIO(data), path)
    except Exception as error:  # as above
        raise FileFormatError(
            f"{path}: its sample inputs are a pickle of more than tensors, which could run code"
        ) from error
