"""Labels as a sampler has them, rows (B, K), and as networks take them.

Two kinds are classes: one-hot "rows" (B, K), a zero row meaning no class, and an "index" (B,). Two are continuous: "float", one
number per sample (B,), and "vector", K of them (B, K); they are never made of, or into, one-hot rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.conditions import class_index
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import is_tracing, one_hot
from amed_engine.sampling.kept import CONTINUOUS

CLASSES = ("rows", "index")
KINDS = (*CLASSES, *CONTINUOUS)


def check_kind(kind: Any, label_dim: int | None, null_class: int | None = None) -> None:
    """Raise ConfigError for a kind that is not known, or contradicts the number of labels or a class that means none."""
    if kind not in KINDS:
        raise ConfigError(
            f"labels must be 'rows' or 'index' for classes, 'float' for one number per sample, or 'vector' for label_dim of "
            f"them, got {kind!r}"
        )
    if kind in CONTINUOUS and null_class is not None:
        raise ConfigError(f"null_class={null_class} is a class, and labels={kind!r} are numbers; leave it out")
    if kind == "float" and label_dim not in (None, 1):
        raise ConfigError(f"labels='float' is one number per sample, got label_dim={label_dim}; use labels='vector'")
    if kind != "float" and not label_dim:
        raise ConfigError(f"labels={kind!r} needs label_dim: how many classes, or numbers per sample")


def told(rows: Tensor, kind: str, null_class: int | None) -> Tensor:
    """Rows (B, K) in the form that a network takes."""
    if kind == "index":
        return class_index(rows, null_class)
    return rows[:, 0] if kind == "float" else rows


def rows_of(labels: Tensor, kind: str, count: int, x: Tensor) -> Tensor:
    """Labels of a call, one for all allowed, as rows (B, count) like x. Raises ConfigError."""
    return number_rows(labels, count, x) if kind in CONTINUOUS else label_rows(labels, count, x)


def number_rows(labels: Tensor, count: int, x: Tensor) -> Tensor:
    """Numbers (B, count), or (B,) where count is 1, one for all allowed, as rows (B, count) like x. Raises ConfigError."""
    expected = f"({'B' if count == 1 else f'B, {count}'}{',' if count == 1 else ''})"
    if not isinstance(labels, Tensor) or labels.dtype == torch.bool or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ConfigError(f"class_labels must be a tensor of real numbers {expected}, got {got}")
    flat = count == 1 and labels.dim() == 1
    if not is_tracing() and not flat and (labels.dim() != 2 or labels.shape[1] != count):
        raise ConfigError(
            f"class_labels are {count} number{'s' * (count > 1)} per sample here, {expected}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    check_rows("class_labels", labels, x)
    return labels.reshape(-1, count).to(x).expand(x.shape[0], count)


def label_rows(class_labels: Tensor, count: int, x: Tensor) -> Tensor:
    """Integers (B,) or one-hot rows (B, count), one for all allowed, as rows (B, count) like x. Raises ConfigError."""
    if not isinstance(class_labels, Tensor):
        raise ConfigError(
            f"class_labels must be a tensor of integers (B,) or rows (B, {count}), got {type(class_labels).__name__}"
        )
    integers = class_labels.dim() == 1 and not class_labels.is_floating_point()
    if not is_tracing() and not integers and tuple(class_labels.shape[1:]) != (count,):
        raise ConfigError(
            f"class_labels must be integers (B,) or rows (B, {count}), got {class_labels.dtype} of shape "
            f"{tuple(class_labels.shape)}"
        )
    check_rows("class_labels", class_labels, x)
    return one_hot(class_labels, count, x).expand(x.shape[0], count)


def check_rows(name: str, value: Tensor, x: Tensor) -> None:
    """Raise ConfigError for another number of rows than x has, or one for all."""
    if not is_tracing() and value.shape[0] not in (1, x.shape[0]):
        raise ConfigError(f"{name} has {value.shape[0]} rows for a batch of {x.shape[0]}; pass one per sample")
