"""Labels of a whole data set, checked at once: millions of them cost a few passes over an array."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amed_engine.engine.model import Model
from amed_engine.engine.request import check_labels
from amed_engine.errors import ConfigError


def model_labels(labels: Any, model: Model, count: int) -> np.ndarray | None:
    """What `Source.check_labels` returns, of a model that is told classes or numbers. Raises ConfigError."""
    if labels is None:
        if model.continuous:
            raise ConfigError(f"labels are missing: this model is told {model.numbers} per sample, which no seed draws")
        return None
    given = torch.from_numpy(label_array(labels)) if model.label_dim else torch.empty(0, device="cpu")
    checked = check_labels(given, model, count, look=True)
    if not checked.is_floating_point():
        return checked.numpy()
    rows = model.label_rows(checked).to(torch.float32)
    if not bool(torch.isfinite(rows).all()):
        raise ConfigError("labels are too large for float32, in which they are stored and told")
    return rows.numpy()


def label_array(labels: Any) -> np.ndarray:
    """Labels of any kind of array, or in a list, as numbers of their own memory on the host. Raises ConfigError."""
    labels = labels.detach().cpu() if isinstance(labels, Tensor) else labels
    try:
        array = np.asarray(labels.float() if getattr(labels, "dtype", None) is torch.bfloat16 else labels)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"labels must be numbers, one or a row for each seed, got {reprlib.repr(labels)}") from error
    if array.dtype.kind not in "iuf":
        raise ConfigError(
            f"labels must be class numbers or rows of numbers, got {array.dtype} {reprlib.repr(labels)} of shape {array.shape}"
        )
    # A copy in the machine's own layout: the caller may go on to write to its array.
    return np.array(array, np.float64 if array.dtype.kind == "f" else np.int64, order="C")


def told(labels: np.ndarray | None) -> Tensor | None:
    """Rows of checked labels as a tensor of their own."""
    return None if labels is None else torch.tensor(labels, device="cpu")


def kept(labels: Tensor | None) -> np.ndarray | None:
    """Labels of a result as they are stored."""
    return None if labels is None else labels.detach().cpu().numpy()
