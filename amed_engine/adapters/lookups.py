"""Networks that look steps or classes up in a table, which takes whole numbers in its range and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import is_tracing

A = TypeVar("A")

# How torch says that nn.Embedding, an index or gather got a floating tensor, and that a whole number has no row.
_FLOATING = re.compile(
    r"'indices' to have|used as indices must be|dtype int64 for index|index tensor of type LongTensor"
)
_OUTSIDE = re.compile(r"index out of range|index \d+ is out of bounds|[Cc]lass values must be")


class TableError(ConfigError):
    """A network was told numbers in floating point where it wants an index."""


def explained(call: Callable[[], A], time: Tensor, labels: Tensor | None) -> A:
    """A call's answer. Raises ConfigError for what the network's tables do not take of what it was told."""
    if torch.compiler.is_compiling() or is_tracing():
        return call()
    try:
        return call()
    except (RuntimeError, IndexError, TypeError) as error:
        if (reason := _reason(error, time, labels)) is None:
            raise
        raise reason from error


def _reason(error: Exception, time: Tensor, labels: Tensor | None) -> ConfigError | None:
    """What the network was told that its tables do not take; None for another error. labels: rows or indices."""
    text = str(error)
    if _OUTSIDE.search(text):
        told = f"steps of {time.dtype}" + ("" if labels is None else f" and classes of {labels.dtype}")
        return ConfigError(
            f"the network looks up a table that has no such row ({_first(text)}); it was told {told}: check label_dim and "
            "null_class against the rows of its tables, and betas= or levels= against its number of steps"
        )
    if not _FLOATING.search(text):
        return None
    ways = []
    if time.is_floating_point():
        ways.append('steps="integer", or levels= with prediction="score", tells it whole steps')
    if labels is not None and labels.is_floating_point():
        ways.append('labels="index" tells it classes by number, not as one-hot rows')
    ways = ways or ["wrap a function that makes an index of what it is told"]
    return TableError(
        f"the network looks up a table, which takes whole numbers, and was told floating ones ({_first(text)}): "
        f"{'; '.join(ways)}"
    )


def _first(text: str) -> str:
    return text.partition("\n")[0].partition(" instead")[0].rstrip(".")
