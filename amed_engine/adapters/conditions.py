"""Conditions of a network (text embeddings, say) as tables whose rows the class labels of a request choose.

So the prompts of a batch pass through everything that classes pass through: seeds, padding, splitting, CUDA graphs, guidance.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import is_tracing


class Conditions(nn.Module):
    """Tables (P, ...) by name, with a row more for "none" where `null` gives one; empty where nothing is bound.

    needed: name -> width of the last dimension (None: any, 0: one number per row) of what the network must be given; other
    names may be bound too.
    Raises ConfigError for a name that is missing, tables of different lengths, or a wrong width.
    """

    def __init__(
        self,
        needed: Mapping[str, int | None],
        bound: Mapping[str, Tensor] | None = None,
        null: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        bound, null = dict(bound or {}), dict(null or {})
        self.names = tuple(dict.fromkeys([*needed, *bound]))
        self.widths = dict(needed)
        self.count, self.has_null = 0, bool(null)
        if not bound and null:
            raise ConfigError("null_conditions stand beside conditions: pass conditions={...} as well")
        if bound:
            self._check_names(bound, "conditions")
            self.count = self._check_tables(bound)
        if null:
            self._check_names(null, "null_conditions")
            self._check_null(null, bound)
        for name, table in bound.items():
            rows = torch.cat([table, null[name].to(table)]) if null else table.detach().clone()
            self.register_buffer(f"table_{name}", rows, persistent=False)

    def _check_names(self, given: Mapping[str, Tensor], what: str) -> None:
        if missing := [name for name in self.names if name not in given]:
            raise ConfigError(f"{what} lack {', '.join(missing)}; the network takes {', '.join(self.names)}")
        if unknown := [name for name in given if name not in self.names]:
            raise ConfigError(f"{what} hold {', '.join(unknown)}; the network takes {', '.join(self.names) or 'none'}")

    def _check_tables(self, bound: Mapping[str, Tensor]) -> int:
        for name, table in bound.items():
            self._check_value(name, table)
        lengths = {name: len(table) for name, table in bound.items()}
        if len(set(lengths.values())) != 1 or not all(lengths.values()):
            raise ConfigError(f"conditions must all have the same number of rows, at least one, got {lengths}")
        return next(iter(lengths.values()))

    def _check_null(self, null: Mapping[str, Tensor], bound: Mapping[str, Tensor]) -> None:
        for name, row in null.items():
            self._check_value(name, row)
            if tuple(row.shape) != (1, *bound[name].shape[1:]):
                raise ConfigError(
                    f"null_conditions[{name!r}] must have shape {(1, *bound[name].shape[1:])}, got {tuple(row.shape)}"
                )

    def _check_value(self, name: str, value: Tensor) -> None:
        width = self.widths.get(name)
        single = width == 0
        if not isinstance(value, Tensor) or (value.dim() != 1 if single else value.dim() < 2):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            row = "number per prompt, (P,)" if single else "row per prompt, (P, ...)"
            raise ConfigError(f"condition {name!r} must be a tensor with a {row}, got {got}")
        if width and value.shape[-1] != width:
            raise ConfigError(
                f"condition {name!r} has width {value.shape[-1]}, the network takes {width}: it belongs to another text encoder"
            )

    def forward(self, labels: Tensor | None, given: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        """The conditions of a batch: what is given in the call, or the rows that labels choose."""
        if given:
            self._check_names(given, "conditions")
            return {name: self._expanded(name, value, batch) for name, value in given.items()}
        if not self.names:
            return {}
        if labels is None or not self.count:
            raise ConfigError(f"the network needs {', '.join(self.names)}; pass them in the call, or bind them in wrap")
        return self._chosen(labels)

    def _expanded(self, name: str, value: Tensor, batch: int) -> Tensor:
        self._check_value(name, value)
        if not is_tracing() and value.shape[0] not in (1, batch):
            raise ConfigError(
                f"condition {name!r} has {value.shape[0]} rows for a batch of {batch}; pass {batch} or one"
            )
        return value.expand(batch, *value.shape[1:])

    def _chosen(self, labels: Tensor) -> dict[str, Tensor]:
        # An index, not a product with one-hot rows: reduced-precision matrix products would round the table.
        index = class_index(labels, self.count if self.has_null else None)
        return {name: getattr(self, f"table_{name}").index_select(0, index) for name in self.names}

    def with_null(self, given: Mapping[str, Tensor], batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Conditions given in a call, and what means "none" in their place, (B, ...) each. Raises ConfigError."""
        self._check_names(given, "conditions")
        if not self.has_null:
            raise ConfigError("guidance needs null_conditions={...} in wrap: what the network is given for no prompt")
        full = {name: self._expanded(name, value, batch) for name, value in given.items()}
        return full, {name: self._null_like(name, value) for name, value in full.items()}

    def _null_like(self, name: str, value: Tensor) -> Tensor:
        row = getattr(self, f"table_{name}")[-1:]
        if not is_tracing() and row.shape[1:] != value.shape[1:]:
            raise ConfigError(
                f"condition {name!r} has rows of shape {tuple(value.shape[1:])}, null_conditions of {tuple(row.shape[1:])}; "
                "guidance needs both alike"
            )
        return row.expand_as(value).to(value)


def class_index(labels: Tensor, null_class: int | None) -> Tensor:
    """One-hot rows (B, K) as integers (B,); a zero row becomes null_class."""
    index = labels.argmax(dim=1)
    return index if null_class is None else torch.where((labels != 0).any(dim=1), index, null_class)
