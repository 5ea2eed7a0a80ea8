"""Endless batches for training, fitting and searching: starting points, and denoisers with their conditions bound."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amed_engine.engine.measure import mean_if_kept
from amed_engine.engine.model import Model, check_guidance
from amed_engine.engine.request import check_labels
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import (
    Denoised,
    Denoiser,
    analytic_first_step,
    as_denoised,
    bind_labels,
    mean_of_labels,
    owned,
)
from amed_engine.solvers.mean import Mean
from amed_engine.solvers.plan import Plan

logger = logging.getLogger("amed_engine")

Condition = Tensor | Denoiser
Conditions = Iterable[Condition] | None


@dataclass(frozen=True)
class BoundDenoiser:
    """The model's own denoiser with conditions bound that can be taken off again, for graphs that have them as an input."""

    lends_copies = True

    model: Model
    labels: Tensor | None
    guidance_scale: float | None

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        return as_denoised(bind_labels(self.model.denoise, self.labels, self.guidance_scale)(x, sigma))


def mean_answer(mean: Mean | None, denoiser: Denoiser) -> Tensor | None:
    """What a first step "mean" starts about for a batch's denoiser (1 or B, ...); None without one.

    A denoiser with conditions of its own bound says nothing of its labels, so there has to be one row alone for it.
    """
    if mean is None:
        return None
    rows = mean.rows()
    if not isinstance(denoiser, BoundDenoiser):
        if len(rows) > 1:
            raise ConfigError(
                'afs="mean" starts about the mean of each class, which a denoiser with its conditions bound does not tell; '
                "pass conditions as tensors, or another afs"
            )
        return rows
    return mean_of_labels(rows.to(denoiser.model.device), denoiser.labels, denoiser.guidance_scale)


def mean_where_told(model: Model, denoisers: Iterable[Denoiser], sigma: float) -> Mean | None:
    """What a first step "mean" of batches with these denoisers starts about; None where one tells no class of its samples, and
    where the mean has more numbers than are kept. Both are logged."""
    if not all(_tells_class(denoiser, model.label_dim) for denoiser in denoisers):
        logger.info("conditions that tell no class: the first step about the mean answer is left out")
        return None
    return mean_if_kept(model, sigma)


def _tells_class(denoiser: Denoiser, label_dim: int) -> bool:
    """Whether its conditions are rows over the classes, or there are none."""
    if not isinstance(denoiser, BoundDenoiser):
        return False
    rows = denoiser.labels is None or tuple(denoiser.labels.shape[1:]) == (label_dim,)
    return rows and not denoiser.model.continuous


def first_answer(plan: Plan, denoiser: Denoiser) -> Denoiser | None:
    """What answers the first evaluation of a plan in the denoiser's place; None where that is its own."""
    return partial(analytic_first_step, mean=mean_answer(plan.mean, denoiser)) if plan.afs else None


def known_shape(model: Model) -> tuple[int, ...]:
    """The shape of one sample. Raises ConfigError where the model does not say."""
    if model.shape is None:
        raise ConfigError(f"the model does not say what shape its samples have; pass {model.shape_asked}")
    return model.shape


class Batches:
    """Endless batches: starting points x = sigma_0 · noise and a denoiser with its conditions bound.

    conditions: None draws class labels where the model has any; or an iterable that gives one entry per batch, class
    numbers (B,), condition tensors (B, ...), or a denoiser (x, sigma) -> D with its own conditions bound. It is
    started anew when it ends.
    """

    def __init__(self, model: Model, plan: Plan, batch: int, generator: torch.Generator, conditions: Conditions = None):
        self.shape = known_shape(model)
        check_guidance(model, plan.guidance_scale)
        self.model, self.plan, self.batch, self.generator = model, plan, batch, generator
        if isinstance(conditions, Tensor):
            raise ConfigError(
                f"conditions give an entry for each batch, got one tensor {tuple(conditions.shape)}; pass a list, of "
                f"[conditions[:{batch}], ...] say"
            )
        self.conditions = None if conditions is None else _endless(conditions)

    def skip(self, rounds: int) -> None:
        """Leave out the conditions of batches that were trained on before; the generator's state says the rest."""
        if self.conditions is not None:
            next(itertools.islice(self.conditions, rounds, rounds), None)

    def probe(self) -> tuple[Denoiser, Tensor]:
        """A denoiser and a starting point for a first look at what the network returns; no condition is used up."""
        if self.conditions is None:
            return self.draw([slice(0, 1)], 1)[0]
        return self._bind(self._first(), slice(0, self.batch)), self._noise(self.batch)

    def unseen(self, seed: int) -> Denoiser:
        """The denoiser of a batch that is not trained on: labels by a generator of its own, or the first conditions, which
        stay."""
        if self.conditions is not None:
            return self._bind(self._first(), slice(0, self.batch))
        generator, self.generator = self.generator, torch.Generator().manual_seed(seed)
        try:
            return self.bind([slice(0, self.batch)])[0]
        finally:
            self.generator = generator

    def _first(self) -> Condition:
        """The next of the conditions, which stays the next."""
        assert self.conditions is not None
        first = next(self.conditions)
        self.conditions = itertools.chain([first], self.conditions)
        return first

    def draw(self, parts: list[slice], batch: int | None = None) -> list[tuple[Denoiser, Tensor]]:
        """The next batch's parts. All of it is drawn whatever the parts, so that they are the same however it is cut."""
        batch = batch or self.batch
        x = self._noise(batch)
        return list(zip(self.bind(parts, batch), (x[part] for part in parts), strict=True))

    def bind(self, parts: list[slice], batch: int | None = None) -> list[Denoiser]:
        """The denoisers of the next batch's parts alone, for starting points of the caller's own."""
        condition = self._condition(batch or self.batch)
        return [self._bind(condition, part) for part in parts]

    def _noise(self, batch: int) -> Tensor:
        x = torch.randn((batch, *self.shape), generator=self.generator, dtype=torch.float32, device="cpu")
        return x.to(self.model.device) * self.plan.sigmas[0]

    def _condition(self, batch: int) -> Condition | None:
        if self.conditions is not None:
            if (given := next(self.conditions)) is None:
                raise ConfigError("conditions gave None for a batch; leave conditions out for labels of the seed's own")
            return given
        if not self.model.label_dim:
            return None
        if self.model.continuous:
            raise ConfigError(
                f"conditions are missing: this model is told {self.model.numbers} per sample, and of which range is not "
                f"known; pass conditions=[...], for each batch a tensor ({self.batch}, {self.model.label_dim}), or "
                "`amed fit --class`"
            )
        return torch.randint(self.model.label_dim, (batch,), generator=self.generator, device="cpu")

    def _bind(self, condition: Condition | None, part: slice) -> Denoiser:
        if condition is None:
            return BoundDenoiser(self.model, None, self.plan.guidance_scale)
        if not isinstance(condition, Tensor):
            return owned(_whole(condition, part, self.batch))
        # A copy: what gives the conditions may give the next ones in the same memory.
        rows = condition[part].to(self.model.device, copy=True)
        if self.model.continuous:
            rows = self.model.label_rows(check_labels(rows, self.model, len(rows), True))
        elif not rows.is_floating_point():
            rows = self.model.label_rows(_classes(rows, self.model.label_dim)).float()
        if not part.stop <= (given := len(condition)) <= self.batch:
            raise ConfigError(f"conditions gave {given} rows for a batch of {self.batch}; give one row per sample")
        return BoundDenoiser(self.model, rows, self.plan.guidance_scale)


def _classes(rows: Tensor, label_dim: int) -> Tensor:
    if not label_dim or rows.dim() != 1 or bool(((rows < 0) | (rows >= label_dim)).any()):
        raise ConfigError(
            f"whole-number conditions must be classes (B,) in 0 .. {label_dim - 1}, got {tuple(rows.shape)} from "
            f"{rows.min().item()} to {rows.max().item()}; the model has label_dim {label_dim}"
        )
    return rows.long()


def _whole(condition: Any, part: slice, batch: int) -> Denoiser:
    if not callable(condition):
        raise ConfigError(
            f"conditions must give tensors or denoisers (x, sigma) -> D for each batch, got {type(condition).__name__}; "
            "classes are a tensor of a number per sample"
        )
    if (part.start, part.stop) != (0, batch):
        raise ConfigError(
            "a denoiser with its conditions bound cannot be cut; "
            "train in one process with accumulate=1, fit samples that are a multiple of batch"
        )
    return condition  # type: ignore[return-value]


def _endless(conditions: Iterable[Condition]) -> Iterator[Condition]:
    """Over and over again; an iterator, which cannot start again, ends with an error."""
    for turn in itertools.count():
        empty = True
        for condition in conditions:
            empty = False
            yield condition
        if empty:
            raise ConfigError(
                f"conditions gave no batch{' any more' if turn else ''}; pass a list, or an iterable that starts anew"
            )
