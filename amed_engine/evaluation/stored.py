"""Samples that are there, judged as `evaluate` judges those it draws: a dataset of `amed generate`, a shard, any pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from amed_engine.datasets.reading import format_of, is_dataset, open_samples
from amed_engine.engine.model import usable
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.evaluation.comparison import REFERENCES
from amed_engine.evaluation.metrics.classifier import DigitClassifier, load_classifier
from amed_engine.evaluation.metrics.features import Extractor, as_floats, extractor
from amed_engine.evaluation.metrics.labelled import read_labelled
from amed_engine.evaluation.metrics.sources import Images, holds_statistics
from amed_engine.evaluation.quality import Report, Tally, closeness, know, of_class
from amed_engine.solvers.plan import Plan

LONGEST = 200  # characters shown of a plan that is none of ours


def evaluate_samples(
    samples: str | os.PathLike,
    *,
    reference: Images | None = None,
    data: Images | None = None,
    features: str | Extractor = "pixels",
    classifier: str | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Report:
    """Measure samples of a file or a folder; one batch is in memory at a time, and their features where they are compared with
    images: beside statistics, or nothing, memory does not grow with the samples.

    samples: a dataset's folder, one of its shards, or pictures as `metrics.batches` reads them. reference, data: images to
    compare with, or an .npz of statistics; "digits" for those the bundled model learned. classifier: "digits" for samples of
    the ten digits, whose classes are in the files. The rest as in `evaluate`. Raises ConfigError and FileFormatError.
    """
    if isinstance(reference, str) and reference in REFERENCES:
        raise ConfigError(
            f"{reference!r} is drawn from the samples' latents; for samples that are there pass images, statistics or nothing"
        )
    device, path = usable(device), Path(samples)
    if not path.exists():
        raise FileFormatError(f"{path} is not there; pass a dataset, a shard, a folder of PNG, or an .npz of pictures")
    for other in (reference, data):
        _check_there(other)
    keep = any(other is not None and not holds_statistics(other) for other in (reference, data))
    tally = Tally(extractor(features, device), _classifier(classifier, device), keep)
    told = read_labelled(path, batch)
    classes: set[int] = set()
    with tqdm(desc="evaluate", unit="sample", unit_scale=True, disable=not progress) as bar:
        for images, labels in told.batches:
            tally.add(_on(images, device, tally.classifier), _classes(labels, tally.classifier, path))
            classes.update(() if labels is None or labels.is_floating_point() else labels.unique().tolist())
            bar.update(len(images))
    only = classes.pop() if len(classes) == 1 else None
    found = tally.known
    near = [
        None if other is None else closeness(found, know(of_class(other, only), tally.extract))
        for other in (reference, data)
    ]
    plan, nfe = _plan(told.about)
    return Report(
        plan=plan,
        nfe=nfe,
        samples=found.statistics.count or 0,
        features=features if isinstance(features, str) else type(features).__name__,
        reference=_name(reference),
        data=_name(data),
        distance=None,
        to_reference=near[0],
        to_data=near[1],
        class_accuracy=tally.accuracy,
        statistics=found.statistics,
    )


def _check_there(other: Images | None) -> None:
    """Before the samples are read, which may take long. Raises FileFormatError."""
    if isinstance(other, (str, os.PathLike)) and other != "digits" and not Path(other).exists():
        raise FileFormatError(f"{other} is not there; pass a folder of PNG, a dataset or an .npz to compare with")


def about_of(samples: str | os.PathLike) -> dict[str, Any]:
    """What the files say of the job; nothing where they are pictures alone. Raises as `evaluate_samples`."""
    path = Path(samples)
    return open_samples(path).about if is_dataset(path) or format_of(path) else {}


def _on(images: Tensor, device: torch.device | str, classifier: DigitClassifier | None) -> Tensor:
    """On the device; as floats where a classifier is to see them too."""
    return images.to(device) if classifier is None else as_floats(images.to(device))


def _classes(labels: Tensor | None, classifier: DigitClassifier | None, path: Path) -> Tensor | None:
    if classifier is not None and (labels is None or labels.is_floating_point()):
        raise ConfigError(
            f"the samples of {path} have no classes to compare with; pass classifier=None (--classifier none)"
        )
    return labels


def _classifier(name: str | None, device: torch.device | str) -> DigitClassifier | None:
    if name not in (None, "digits"):
        raise ConfigError(f"classifier must be 'digits' or None, got {name!r}")
    return None if name is None else load_classifier()[0].to(device)


def _plan(about: dict[str, Any]) -> tuple[str, int | None]:
    """The plan in words, and its evaluations; of one that is kept by its hash, or by another kind of source, what is told."""
    told = about.get("plan")
    try:
        plan = Plan.from_json(told)
        return plan.describe(), plan.nfe
    except (ConfigError, ValueError, TypeError):
        text = (
            "a plan that the files do not tell" if told is None else told if isinstance(told, str) else json.dumps(told)
        )
        return text[:LONGEST], None


def _name(images: Any) -> str | None:
    return None if images is None else str(images) if isinstance(images, (str, os.PathLike)) else type(images).__name__
