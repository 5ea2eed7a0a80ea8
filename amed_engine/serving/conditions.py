"""Conditions of a network (text embeddings, masks) row by row: what requests bring, or what their labels choose of tables."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters import Adapter
from amed_engine.adapters.guidance import ClassifierFree, Thresholded
from amed_engine.engine.model import Model
from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import bare
from amed_engine.solvers.arguments import told

Given = dict[str, Tensor]  # (n or 1, ...) each


class RowConditions:
    """Room for the conditions of `count` rows. Their shapes, and whether they are numbers, integers or truth values, are those
    of the tables that are bound to the model, or else of the first request: all rows of a batch are alike. Numbers are kept in
    `dtype`, the engine's."""

    def __init__(self, adapter: Adapter, count: int, device: torch.device, dtype: torch.dtype):
        self.tables, self.count, self.device, self.dtype = adapter.conditions, count, device, dtype
        self.rows: Given = {}
        self.null: Given = {}
        self._lock = threading.Lock()
        if self.tables.count:
            first = self.tables(torch.eye(self.tables.count, device=device)[:1], {}, 1)
            self._make(first)
            if self.tables.has_null:
                self.null = self.tables.with_null(first, 1)[1]

    def check(self, given: Any, samples: int, guided: bool) -> Given:
        """The conditions of a request, on the device. Raises ConfigError."""
        _check_tensors(given, self.tables.names, self.dtype)
        if guided:
            self.tables.with_null(given, samples)
        full = self.tables(None, given, samples)
        with self._lock:
            if not self.rows:
                self._make(full)
        for name, value in full.items():
            _check_like(name, value, self.rows[name])
        return {name: value.to(self.rows[name]) for name, value in given.items()}

    def chosen(self, given: Given | None, indices: Sequence[int], labels: Tensor | None) -> Given:
        """Of these samples (n, ...): what the request gave, or what label rows (n, K) choose."""
        count = len(indices)
        if given is None:
            return self.tables(labels, {}, count)
        return {
            name: (value if len(value) == 1 else picked(value, indices)).expand(count, *value.shape[1:])
            for name, value in given.items()
        }

    def write(self, rows: Tensor, chosen: Sequence[Given]) -> None:
        for name, room in self.rows.items():
            room.index_copy_(0, rows, torch.stack([each[name] for each in chosen]).to(room))

    def move(self, old: Tensor, new: Tensor) -> None:
        for room in self.rows.values():
            room.index_copy_(0, new, room.index_select(0, old))

    def first(self, size: int) -> Given:
        """Of the first rows."""
        if not self.rows:
            raise ConfigError(
                "the shapes of the conditions are not known before a request brings some; submit one first"
            )
        return {name: room[:size] for name, room in self.rows.items()}

    def none(self, size: int) -> Given:
        """What means "none" in their place, for as many rows."""
        return {name: row.expand(size, *row.shape[1:]) for name, row in self.null.items()}

    def described(self) -> dict[str, dict[str, Any] | None]:
        """Shape of a row and dtype by name, as JSON has them; None while they are not known."""
        return {
            name: {"shape": list(room.shape[1:]), "dtype": str(room.dtype).removeprefix("torch.")}
            if (room := self.rows.get(name)) is not None
            else None
            for name in self.tables.names
        }

    def _make(self, like: Given) -> None:
        for name, value in like.items():
            dtype = self.dtype if value.is_floating_point() else value.dtype
            self.rows[name] = torch.zeros(self.count, *value.shape[1:], dtype=dtype, device=self.device)


def _check_tensors(given: Any, names: Sequence[str], dtype: torch.dtype) -> None:
    """Raises ConfigError."""
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"conditions must be tensors by name, of {', '.join(names)}, got {told(given)}")
    if unknown := [name for name in given if name not in names]:
        raise ConfigError(f"conditions hold {', '.join(map(str, unknown))}; the network takes {', '.join(names)}")
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"condition {name!r} must be a tensor (B, ...), got {type(value).__name__}")
        if value.is_floating_point() and not bool(value.to(dtype).isfinite().all()):
            raise ConfigError(f"condition {name!r} holds NaN or infinite values, or such as {dtype} does not hold")


def _check_like(name: str, value: Tensor, room: Tensor) -> None:
    """Raises ConfigError."""
    if value.shape[1:] != room.shape[1:]:
        raise ConfigError(
            f"condition {name!r} has rows of shape {tuple(value.shape[1:])}, this engine's are {tuple(room.shape[1:])}; "
            "pad it, or make an engine for that shape"
        )
    both = value.is_floating_point() and room.is_floating_point()
    if not both and value.dtype != room.dtype:
        raise ConfigError(
            f"condition {name!r} is {value.dtype}, this engine's are {room.dtype}, as its tables or its first request had it; "
            "convert it"
        )


def picked(values: Tensor, indices: Sequence[int]) -> Tensor:
    """These of the values, on their device: one by one, since a GPU is sent a list of numbers while the host waits."""
    return torch.stack([values[index] for index in indices])


def conditions_of(model: Model, count: int, device: torch.device, dtype: torch.dtype) -> RowConditions | None:
    """Room for the conditions of a model's rows; None for a network that takes none."""
    adapter = takes_conditions(model)
    return None if adapter is None else RowConditions(adapter, count, device, dtype)


def takes_conditions(model: Model) -> Adapter | None:
    """The adapter of a network that takes conditions."""
    inner = bare(model.network)
    while isinstance(inner, (ClassifierFree, Thresholded)):
        inner = bare(inner.denoiser)
    return inner if isinstance(inner, Adapter) and inner.conditions.names else None
