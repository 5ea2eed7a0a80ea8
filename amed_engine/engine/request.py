"""From the arguments of `Sampler.run` to latents and labels, all of it checked before any network runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from amed_engine.engine.arrays import imported
from amed_engine.engine.model import Model
from amed_engine.engine.seeds import check_seeds, draw, draw_all, draw_seeds
from amed_engine.errors import ConfigError

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Request:
    """Latents (B, C, H, W) of unit variance and labels (B, label_dim) on the device; seeds and classes as reported.

    noises: (B, K, C, H, W) of unit variance, which the solver adds on its way; None where it adds none.
    """

    latents: Tensor
    labels: Tensor | None
    seeds: list[int] | None
    classes: Tensor | None
    noises: Tensor | None = None
    first_row: int = 0  # in the whole batch, where this is a piece of it

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Latents and, for a conditional model, labels."""
        return (self.latents,) if self.labels is None else (self.latents, self.labels)

    @property
    def all_inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the loop takes: latents, labels, noises."""
        return self.latents, self.labels, self.noises

    def rows(self, start: int, stop: int) -> Request:
        def cut(field: Any) -> Any:
            return None if field is None else field[start:stop]

        labels, seeds, classes, noises = map(cut, (self.labels, self.seeds, self.classes, self.noises))
        return Request(self.latents[start:stop], labels, seeds, classes, noises, start)


def make_request(
    model: Model,
    batch: int | Sequence[int] | Tensor,
    class_labels: int | float | Sequence | Tensor | None,
    generator: torch.Generator | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    look: bool = True,
    noises: int = 0,
) -> Request:
    """Check and complete what was asked; see `Sampler.run`. Raises ConfigError.

    look: read values that are on the device (NaN in latents, the range of labels), which waits for it. noises: how many the
    solver adds to each sample.
    """
    batch, class_labels = imported("batch", batch), imported("class_labels", class_labels)
    if generator is not None and not isinstance(batch, Integral):
        raise ConfigError(
            "generator draws the seeds where batch is a number, and has no say in seeds or latents; leave it out"
        )
    if isinstance(batch, Tensor) and batch.is_floating_point():
        latents, seeds, drawn, fresh = check_latents(batch, model, dtype, device, look), None, None, None
        if noises:
            raise ConfigError(
                "this solver adds fresh noise to each sample, drawn from its seed, and latents have none; pass seeds, "
                "or latents and noises to amed_engine.sample(model, sigma_max * latents, levels, solver, noises=...)"
            )
        if model.classes and class_labels is None:
            # Latents have no seeds: the row numbers stand in for them.
            _, drawn = draw(range(len(latents)), (), model.classes)
    else:
        seeds = read_seeds(batch, generator)
        noise, drawn, more = draw_all(seeds, shape_of(model), model.classes, noises)
        latents, fresh = sent(noise, device, dtype), sent(more, device, dtype) if noises else None
    classes = drawn if class_labels is None else check_labels(class_labels, model, len(latents), look)
    if classes is None and model.continuous:
        raise ConfigError(
            f"class_labels are missing: this model is told {model.numbers} per sample, which no seed draws; pass "
            "class_labels=, or --class on the command line"
        )
    classes = None if classes is None else classes.clone()  # reported, whatever the caller does to its own
    labels = None if classes is None else model.label_rows(sent(classes, device)).to(dtype)
    return Request(latents, labels, seeds, classes, fresh)


def read_seeds(batch: Any, generator: torch.Generator | None = None) -> list[int]:
    """The seeds of a batch that is no latents: as given, or so many drawn. Raises ConfigError."""
    if isinstance(batch, Integral) and not isinstance(batch, bool):  # NumPy's integers too
        return draw_seeds(int(batch), generator)
    if isinstance(batch, Tensor) and batch.dim() == 1:
        batch = batch.tolist()
    if isinstance(batch, (str, bytes, bool)) or not isinstance(batch, (Sequence, range)):
        raise ConfigError(
            "batch must be a number of samples, a sequence of seeds or a float tensor of latents (B, C, H, W), "
            f"got {named(batch)}"
        )
    return check_seeds(batch)


def named(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def shape_of(model: Model) -> tuple[int, ...]:
    """The shape of one sample. Raises ConfigError where it is not known."""
    if model.shape is None:
        raise ConfigError(
            f"the model does not say what shape its samples have; pass {model.shape_asked} to the Sampler, or latents to run"
        )
    return model.shape


def check_latents(latents: Tensor, model: Model, dtype: torch.dtype, device: torch.device, look: bool) -> Tensor:
    """Latents (B, *shape) of a model, finite where one may look. Raises ConfigError."""
    shape = model.shape
    if shape is None and latents.dim() < 2:
        raise ConfigError(f"latents must have shape (B, C, ...), a row for each sample, got {tuple(latents.shape)}")
    expected = "" if shape is None else f"(B, {', '.join(map(str, shape))})"
    if shape is not None and latents.dim() != len(shape) + 1:
        raise ConfigError(f"latents must have shape {expected}, got {tuple(latents.shape)}")
    if shape is not None and tuple(latents.shape[1:]) != tuple(shape):
        raise ConfigError(f"latents must have shape {expected} for this model, got {tuple(latents.shape)}")
    if not len(latents):
        raise ConfigError("latents hold no samples: the batch is empty; ask for at least one")
    if latents.dtype != dtype:
        raise ConfigError(
            f"latents must be {dtype}, the sampler's dtype, got {latents.dtype}; convert them or pass dtype= to the Sampler"
        )
    if latents.device != device:
        raise ConfigError(
            f"latents are on {latents.device}, the sampler on {device}; move them, or pass device= to the Sampler"
        )
    if look and not bool((finite := torch.isfinite(latents).flatten(1).all(1)).all()):
        raise ConfigError(f"latents hold NaN or infinite values in rows {(~finite).nonzero().flatten().tolist()}")
    return latents


def check_labels(labels: Any, model: Model, batch: int, look: bool) -> Tensor:
    """Classes (B,), or rows or numbers as they are given, one for all allowed. Raises ConfigError."""
    label_dim = model.label_dim
    if not label_dim:
        raise ConfigError("class_labels were given, but the model is unconditional (label_dim 0); leave them out")
    try:
        labels = torch.as_tensor(labels, device=getattr(labels, "device", "cpu")).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"class_labels must be class numbers or vectors, got {labels!r}") from error
    look = look or labels.device.type == "cpu"
    if model.continuous:
        return _check_numbers(labels, model, batch, look)
    if labels.is_floating_point() or tuple(labels.shape) == (batch, label_dim):
        return _check_vectors(labels, label_dim, batch, look)
    if labels.dtype in INTEGERS and labels.dim() == 0:
        labels = labels.expand(batch)
    if labels.dtype not in INTEGERS or tuple(labels.shape) != (batch,):
        several = labels.dtype in INTEGERS and labels.dim() == 1
        raise ConfigError(
            f"class_labels must be one integer, {batch} integers or vectors ({batch}, {label_dim}), got "
            + (f"{len(labels)} integers" if several else f"{labels.dtype} of shape {tuple(labels.shape)}")
        )
    if look and bool(((labels < 0) | (labels >= label_dim)).any()):
        bad = labels[(labels < 0) | (labels >= label_dim)][0].item()
        raise ConfigError(f"class_labels must be in 0 .. {label_dim - 1}, got {bad}")
    return labels.to(torch.int64)


def _check_numbers(labels: Tensor, model: Model, batch: int, look: bool) -> Tensor:
    """Numbers (B, P), (B,) where P is 1, or those of one sample for all: () or (P,)."""
    count, shape = model.label_dim, tuple(labels.shape)
    one = shape == (() if count == 1 else (count,))
    if (
        labels.dtype == torch.bool
        or labels.is_complex()
        or not (one or shape == (batch, count) or shape == (batch,) * (count == 1))
    ):
        several = f"one number, {batch} of them" if count == 1 else f"{count} numbers"
        raise ConfigError(
            f"class_labels are {model.numbers} per sample for this model: {several}, or rows ({batch}, {count}); got "
            f"{labels.dtype} of shape {shape}"
        )
    if look and not bool(torch.isfinite(labels).all()):
        raise ConfigError("class_labels hold NaN or infinite values")
    numbers = labels if labels.is_floating_point() else labels.float()
    return numbers.expand(batch, *shape) if one else numbers


def _check_vectors(labels: Tensor, label_dim: int, batch: int, look: bool) -> Tensor:
    if tuple(labels.shape) != (batch, label_dim) or labels.is_complex():
        raise ConfigError(
            f"class_labels as vectors must have shape ({batch}, {label_dim}), got {labels.dtype} {tuple(labels.shape)}; the "
            "number of a class is an integer"
        )
    if look and not bool(torch.isfinite(labels).all()):
        raise ConfigError("class_labels hold NaN or infinite values")
    return labels if labels.is_floating_point() else labels.float()


def sent(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """On the device; from the host by pinned memory, since an ordinary copy would wait for all the device has to do."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True).to(dtype or values.dtype)
