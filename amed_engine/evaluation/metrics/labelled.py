"""Images of files, with their classes and what else the files say: of a dataset, of a shard, of what `amed sample` wrote."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amed_engine.datasets.formats.npz import read_head
from amed_engine.datasets.reading import format_of, is_dataset, members, open_samples
from amed_engine.engine.images import read_notes
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.evaluation.metrics.sources import BATCH, as_images, batches, png_files

logger = logging.getLogger("amed_engine")

MAX_LABELS = 1 << 27  # bytes


@dataclass(frozen=True)
class Labelled:
    """about: what the files say of how they were drawn. batches: images (B, C, H, W), and labels (B, ...) or None."""

    about: dict[str, Any]
    batches: Iterator[tuple[Tensor, Tensor | None]]


def read_labelled(path: Path, batch: int = BATCH) -> Labelled:
    """A file or folder as `batches` reads it. Raises FileFormatError."""
    if is_dataset(path) or format_of(path):
        stored = open_samples(path)
        parts = ((as_images(part), part.labels) for part in stored.batches(batch))
        return Labelled(stored.about, ((images, None if own is None else torch.tensor(own)) for images, own in parts))
    about, labels = _of_npz(path) if path.suffix == ".npz" and path.is_file() else _of_pictures(png_files(path))
    return Labelled(about, _in_turn(path, batches(path, batch), labels))


def of_one_class(path: Path, label: int) -> Iterator[Tensor] | None:
    """The images of one class, said to be so many; None where the files do not say which they are. Raises ConfigError where
    none is."""
    parts = read_labelled(path).batches
    images, labels = next(parts, (None, None))
    if images is None or labels is None or labels.is_floating_point() or labels.dim() > 1:
        return None
    return _of_class(path, label, itertools.chain([(images, labels)], parts))


def _of_class(path: Path, label: int, parts: Iterator[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
    count = 0
    for images, own in parts:
        chosen = images[own == label]
        count += len(chosen)
        if len(chosen):
            yield chosen
    if not count:
        raise ConfigError(f"{path} has no images of class {label}, of which all the samples are; compare with others")
    logger.warning("samples are of class %d: compared with the %d images of that class in %s", label, count, path)


def _in_turn(path: Path, images: Iterator[Tensor], labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    start = 0
    for part in images:
        own = None if labels is None else labels[start : start + len(part)]
        start += len(part)
        if labels is not None and start > len(labels):
            raise FileFormatError(f"{path} has {len(labels)} labels, and more images")
        yield part, own
    if labels is not None and start < len(labels):
        raise FileFormatError(f"{path} has {len(labels)} labels, and {start} images")


def _of_npz(path: Path) -> tuple[dict[str, Any], Tensor | None]:
    """Plan and labels beside arr_0, where they are. Raises FileFormatError."""
    found: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in members(path) & {"plan.npy", "labels.npy"}:
                if archive.getinfo(name).file_size > MAX_LABELS:
                    raise FileFormatError(f"{name} has more than {MAX_LABELS} bytes")
                with archive.open(name) as member:
                    shape, dtype = read_head(member)
                    found[name] = np.frombuffer(member.read(), dtype).reshape(shape)
    except Exception as error:  # zipfile and numpy raise all kinds of errors for damaged bytes
        raise FileFormatError(f"{path}: its plan or labels cannot be read: {error}") from error
    plan, labels = found.get("plan.npy"), found.get("labels.npy")
    told = {} if plan is None or plan.dtype.kind != "U" or plan.size != 1 else {"plan": str(plan.reshape(())[()])}
    if labels is None or labels.dtype.kind not in "iuf":
        return told, None
    return told, torch.tensor(labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64))


def _of_pictures(files: Sequence[Path]) -> tuple[dict[str, Any], Tensor | None]:
    """The plan that all pictures name, and the class of each where all of them have one."""
    notes = [read_notes(file) or {} for file in files]
    plans = {own.get("plan") for own in notes}
    plan = plans.pop() if len(plans) == 1 else "several plans"
    classes: list[Any] = []
    with contextlib.suppress(KeyError, ValueError):
        classes = [json.loads(own["class"]) for own in notes]
    whole = len(classes) == len(files) and all(type(label) is int for label in classes)
    return {} if plan is None else {"plan": plan}, torch.tensor(classes) if whole else None
