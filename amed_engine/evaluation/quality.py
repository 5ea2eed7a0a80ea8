"""One sampler, judged: against a fine solution from the same latents, against images, against the classes asked for.

    distance      RMSE, PSNR and per-image quantiles to the reference solution of the same latents
    to_reference  Frechet distance, precision and recall against the set of reference images
    to_data       the same against real images
    class_accuracy  how many samples a classifier takes for the class they were drawn for

The first judges the solver alone, the others what it makes of the model.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from amed_engine.engine.sampler import Sampler
from amed_engine.errors import ConfigError, require
from amed_engine.evaluation.comparison import REFERENCES, Setting
from amed_engine.evaluation.metrics import Distances, Statistics, frechet_distance, gather, per_image_rmse
from amed_engine.evaluation.metrics.classifier import DigitClassifier, class_accuracy, load_classifier
from amed_engine.evaluation.metrics.features import Extractor, extractor
from amed_engine.evaluation.metrics.labelled import of_one_class
from amed_engine.evaluation.metrics.manifold import Manifold
from amed_engine.evaluation.metrics.sources import Images, holds_statistics, read_features
from amed_engine.solvers.plan import Plan

logger = logging.getLogger("amed_engine")

NEIGHBOURS = 3


@dataclass(frozen=True)
class Known:
    """What is known of a set of images: statistics, and the features (N, F) unless only an .npz of the first is there."""

    statistics: Statistics
    features: Tensor | None

    @classmethod
    def of(cls, features: Tensor) -> Known:
        return cls(Statistics().update(features), features)

    @cached_property
    def manifold(self) -> Manifold | None:
        """None without features, or with no more of them than neighbours are counted."""
        if self.features is None or len(self.features) <= NEIGHBOURS:
            return None
        return Manifold.of(self.features, NEIGHBOURS)


@dataclass(frozen=True)
class Closeness:
    """Of one set of images to another. precision and recall are None where the other is known by statistics alone, or
    one of both has no more images than neighbours are counted."""

    frechet: float
    precision: float | None = None
    recall: float | None = None


def know(source: Images, extract: Extractor) -> Known:
    """Any source of `metrics.batches`, or an .npz of statistics, by their features. Raises as `metrics.gather` does."""
    if holds_statistics(source):
        return Known(gather(source, extract), None)
    return Known.of(read_features(source, extract))


def closeness(samples: Known, other: Known) -> Closeness:
    """Frechet distance of two sets; precision and recall of the samples, the other being the data."""
    distance = frechet_distance(samples.statistics, other.statistics)
    ours, theirs = samples.manifold, other.manifold
    if ours is None or theirs is None:
        return Closeness(distance)
    return Closeness(distance, theirs.part_inside(ours.points), ours.part_inside(theirs.points))


@dataclass(frozen=True)
class Report:
    """What `evaluate` found; None for what there was nothing to compare with."""

    plan: str
    nfe: int | None
    samples: int
    features: str
    reference: str | None
    data: str | None
    distance: Distances | None
    to_reference: Closeness | None
    to_data: Closeness | None
    class_accuracy: float | None
    statistics: Statistics

    def to_json(self) -> dict:
        """All of it but the samples' statistics."""
        data = asdict(self)
        del data["statistics"]
        return data

    def table(self) -> str:
        """For people, a line per number."""
        lines = [self.plan, f"{self.samples} samples, features {self.features}"]
        if self.distance:
            quantiles = ", ".join(f"{q}: {value:.4f}" for q, value in self.distance.quantiles.items())
            decibels = "" if self.distance.psnr is None else f", PSNR {self.distance.psnr:.2f} dB"
            lines.append(f"distance to {self.reference}: RMSE {self.distance.rmse:.4f}{decibels}")
            lines.append(f"quantiles of the images' RMSE: {quantiles}")
        for name, near in ((self.reference, self.to_reference), (self.data, self.to_data)):
            if near:
                both = "" if near.precision is None else f", precision {near.precision:.3f}, recall {near.recall:.3f}"
                lines.append(f"against {name}: Frechet distance {near.frechet:.4f}{both}")
        if self.class_accuracy is not None:
            lines.append(f"class accuracy {self.class_accuracy:.4f}")
        return "\n".join(lines)


class Tally:
    """Features, and classes recognised, of images that come batch by batch. keep: the features, which `Closeness` to images
    needs; their statistics alone take no more memory the more there are."""

    def __init__(self, extract: Extractor, classifier: DigitClassifier | None = None, keep: bool = True):
        self.extract, self.classifier, self._keep = extract, classifier, keep
        self._features: list[Tensor] = []
        self._statistics = Statistics()
        self._hits, self._count = 0.0, 0

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        features = self.extract(images)
        if self._keep:
            self._features.append(features.clone())  # not what they may be a view of
        else:
            self._statistics.update(features)
        self._count += len(images)
        if self.classifier is not None and labels is not None:
            self._hits += class_accuracy(images, labels, self.classifier) * len(images)

    @property
    def known(self) -> Known:
        return Known.of(torch.cat(self._features)) if self._keep else Known(self._statistics, None)

    @property
    def accuracy(self) -> float | None:
        return None if self.classifier is None else self._hits / self._count


def evaluate(
    sampler: Sampler,
    seeds: Sequence[int] = range(512),
    *,
    reference: str = "deis-fine",
    data: Images | None = None,
    features: str | Extractor = "pixels",
    classifier: str | None = None,
    setting: Setting | None = None,
    progress: bool = False,
) -> Report:
    """Draw the samples of these seeds and measure them; images are let go batch by batch, their features are kept.

    reference: "deis-fine" or "heun-fine", 80 evaluations of the sampler's model from the same latents; or a folder of PNG or
    an .npz of statistics, to which no sample has a distance of its own. data: real images, "digits" for those the bundled
    model learned, any source of `metrics.batches`, an .npz; None for none. features: see `metrics.extractor`.
    classifier: "digits" for models of the ten digits; None for none. setting: class_labels, guidance_scale and batch.
    progress: a bar on stderr. Where all samples are of one class, so are the digits; other images have no labels, are taken as
    they are, and a warning says so. Raises ConfigError, FileFormatError and what `Sampler.run` raises.
    """
    if not isinstance(sampler, Sampler):
        raise ConfigError(f"evaluate takes a Sampler, got {type(sampler).__name__}; pass Sampler(model, nfe=...)")
    setting, seeds = setting or Setting(), list(seeds)
    if not seeds:
        raise ConfigError("seeds are empty; pass at least two, e.g. range(512)")
    extract = extractor(features, sampler.device)
    real = None if data is None else know(of_class(data, _one_class(setting)), extract)
    own, fine = Tally(extract, _classifier(classifier, sampler)), Tally(extract)
    exact = _reference_sampler(reference, sampler)
    images = know(of_class(reference, _one_class(setting)), extract) if exact is None else None
    plan, errors = _draw(sampler, exact, seeds, setting, own, fine, progress)
    samples = own.known
    return Report(
        plan=plan.describe(),
        nfe=plan.nfe,
        samples=len(seeds),
        features=features if isinstance(features, str) else type(features).__name__,
        reference=reference,
        data=None if data is None else data if isinstance(data, str) else type(data).__name__,
        distance=Distances.of(torch.cat(errors)) if errors else None,
        to_reference=closeness(samples, images or fine.known),
        to_data=None if real is None else closeness(samples, real),
        class_accuracy=own.accuracy,
        statistics=samples.statistics,
    )


def _draw(
    sampler: Sampler, exact: Sampler | None, seeds: list[int], setting: Setting, own: Tally, fine: Tally, progress: bool
) -> tuple[Plan, list[Tensor]]:
    """Fill the tallies, batch by batch in step; the plan that ran, and the images' RMSE where there is a fine solution."""
    errors = []
    total = len(seeds) * (sampler.nfe + (exact.nfe if exact else 0))
    with tqdm(total=total, desc="evaluate", unit="eval", unit_scale=True, disable=not progress) as bar:
        truths = setting.results(exact, seeds, bar) if exact else itertools.repeat(None)
        plan = sampler.plan
        for result, truth in zip(setting.results(sampler, seeds, bar), truths, strict=False):
            plan = result.plan  # a bundled predictor steps aside for guidance it was not trained for
            own.add(result.images, result.labels)
            if truth is not None:
                fine.add(truth.images, truth.labels)
                errors.append(per_image_rmse(result.images, truth.images).cpu())
    return plan, errors


def _one_class(setting: Setting) -> int | None:
    """The class that all samples are of, where one is asked for."""
    return setting.class_labels if isinstance(setting.class_labels, int) else None


def of_class(data: Images, label: int | None) -> Images:
    """The data that samples of one class are to be compared with: that class, where the data say which is which."""
    if isinstance(data, str) and data == "digits":
        return bundled_digits(label)
    if label is None:
        return data
    named = isinstance(data, (str, os.PathLike))
    if named and not holds_statistics(data) and (own := of_one_class(Path(data), label)) is not None:
        return own
    logger.warning(
        "samples are of class %d; data %s have no labels and are taken as they are: pass images of that class alone",
        *(label, data if named else "given"),
    )
    return data


def bundled_digits(label: int | None = None) -> Tensor:
    """The images that the bundled model learned, of all classes or of one."""
    from amed_engine.zoo.train_digits import load_digits

    require("sklearn", "zoo", "data='digits'", "pass a folder or 'none'")
    digits = load_digits(torch.device("cpu"))
    return digits.images if label is None else digits.images[digits.labels == label]


def _classifier(name: str | None, sampler: Sampler) -> DigitClassifier | None:
    if name is None:
        return None
    if name != "digits" or sampler.model.label_dim != 10:
        raise ConfigError(
            f"classifier must be 'digits', for a model with 10 classes, or None; got {name!r} and {sampler.model.label_dim} "
            "classes"
        )
    return load_classifier()[0].to(sampler.device)


def _reference_sampler(reference: str, sampler: Sampler) -> Sampler | None:
    """Of the same model, for the names of REFERENCES; None for a path."""
    if reference not in REFERENCES:
        if not Path(reference).exists():
            raise ConfigError(f"reference {reference!r} is neither {', '.join(REFERENCES)} nor a folder or .npz file")
        return None
    if not sampler.plan.make_solver().integrates:
        raise ConfigError(
            f"solver {sampler.plan.solver!r} draws from a consistency function, of which {reference!r} is no solution; pass "
            "reference= a folder of PNG or an .npz of statistics"
        )
    model = sampler.model
    facts = {"shape": model.shape, "label_dim": model.label_dim, "device": sampler.device, "dtype": sampler.dtype}
    noise = {"sigma_min": sampler.plan.sigmas[-1], "sigma_max": sampler.plan.sigmas[0]}
    return Sampler(model.network, **facts, **noise, **REFERENCES[reference])
