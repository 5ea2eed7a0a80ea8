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

Given = dict[str, Tensor]  # (n or 1, ...) each


class RowConditions:
    """Room for the conditions of `count` rows. Their shapes are those of the tables that are bound to the model, or else of
    the first request: all rows of a batch are alike."""

    def __init__(self, adapter: Adapter, count: int, device: torch.device):
        self.tables, self.count, self.device = adapter.conditions, count, device
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
        if not isinstance(given, Mapping) or not all(isinstance(value, Tensor) for value in given.values()):
            raise ConfigError(f"conditions must be tensors by name, (B, ...) each, got {type(given).__name__}")
        if guided:
            self.tables.with_null(given, samples)
        full = self.tables(None, given, samples)
        with self._lock:
            if not self.rows:
                self._make(full)
        for name, value in full.items():
            room = self.rows[name]
            if value.shape[1:] != room.shape[1:]:
                raise ConfigError(
                    f"condition {name!r} has rows of shape {tuple(value.shape[1:])}, this engine's are "
                    f"{tuple(room.shape[1:])}; pad it, or make an engine for that shape"
                )
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

    def _make(self, like: Given) -> None:
        self.rows = {name: value.new_zeros(self.count, *value.shape[1:]) for name, value in like.items()}


def picked(values: Tensor, indices: Sequence[int]) -> Tensor:
    """These of the values, on their device: one by one, since a GPU is sent a list of numbers while the host waits."""
    return torch.stack([values[index] for index in indices])


def conditions_of(model: Model, count: int, device: torch.device) -> RowConditions | None:
    """Room for the conditions of a model's rows; None for a network that takes none."""
    adapter = takes_conditions(model)
    return None if adapter is None else RowConditions(adapter, count, device)


def takes_conditions(model: Model) -> Adapter | None:
    """The adapter of a network that takes conditions."""
    inner = bare(model.network)
    while isinstance(inner, (ClassifierFree, Thresholded)):
        inner = bare(inner.denoiser)
    return inner if isinstance(inner, Adapter) and inner.conditions.names else None
