"""Networks that look steps or classes up in a table, which takes whole numbers in its range and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import is_tracing
from amed_engine.sampling.modules import module_of

A = TypeVar("A")

# How torch says that nn.Embedding, an index or gather got a floating tensor, and that a whole number has no row.
_FLOATING = re.compile(
    r"'indices' to have|used as indices must be|dtype int64 for index|index tensor of type LongTensor"
)
_OUTSIDE = re.compile(r"index out of range|index \d+ is out of bounds|[Cc]lass values must be")
# How it says that a layer of floating weights got whole numbers.
_WHOLE = re.compile(r"same dtype.*\b(Long|Int)\b|not implemented for '(Long|Int)'")
# How it says that a layer is not of the size of what it got, and that one number was wanted of several.
_SIZE = re.compile(r"mat1 and mat2 shapes cannot be multiplied|size mismatch|to have \d+ channels, but got")
_ONE_NUMBER = re.compile(r"cannot be converted to Scalar|Boolean value of Tensor|only one element tensors")


class TableError(ConfigError):
    """A network was told numbers in floating point where it wants an index."""


def null_class_hint(network: Any, classes: int) -> str:
    """The option of `wrap` that says which class means none, with its number where a table has one row more than classes."""
    module = module_of(network)
    tables = (
        () if module is None or not classes else (part for part in module.modules() if isinstance(part, nn.Embedding))
    )
    if any(table.num_embeddings == classes + 1 for table in tables):
        return f"null_class={classes} (its table of classes has {classes + 1} rows, the last for none)"
    return "null_class=..."


def wants_index(error: Exception) -> bool:
    """Whether torch says that a table was told floating numbers."""
    return _FLOATING.search(str(error)) is not None


def told_floats(error: Exception, network: Any, classes: int) -> ConfigError:
    """For a denoiser with a table, which was told noise levels, and classes, as every denoiser is."""
    told, how, end = "", 'steps="integer"', ""
    if classes:
        told, how = f" and classes as one-hot rows (B, {classes})", f'label_dim={classes}, labels="index"'
        end = f', of a denoiser prediction="denoised", and {null_class_hint(network, classes)} where a class means none'
    return ConfigError(
        f"the model looks up a table, which takes whole numbers, and denoisers are told noise levels{told} "
        f"({_first(str(error))}): amed_engine.wrap(network, prediction=..., {how}){end}"
    )


def explained(call: Callable[[], A], time: Tensor, labels: Tensor | None, network: Any = None) -> A:
    """A call's answer. Raises ConfigError for what the network's tables do not take of what it was told, or a layer of its
    classes."""
    if torch.compiler.is_compiling() or is_tracing():
        return call()
    try:
        return call()
    except ConfigError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        if (reason := _reason(error, time, labels, network)) is None:
            told = "" if labels is None else f", classes {_shape(labels)}"
            error.add_note(
                f"the network was told its time as {_shape(time)}{told}; one that takes them otherwise is wrapped in a "
                "function, such as lambda x, t: network(x, t[:, None])"
            )
            raise
        raise reason from error


def _reason(error: Exception, time: Tensor, labels: Tensor | None, network: Any) -> ConfigError | None:
    """What the network was told that its tables do not take; None for another error. labels: rows or indices."""
    text = str(error)
    if labels is not None and not labels.is_floating_point() and _WHOLE.search(text):
        return ConfigError(
            f"a layer of the network takes floating numbers ({_first(text)}), and was told classes as an index "
            f"{_shape(labels)}: "
            'labels="rows" tells it one-hot rows, which say no class by zeros; leave null_class out'
        )
    if _SIZE.search(text):
        return _wrong_size(_first(text), labels)
    if _ONE_NUMBER.search(text):
        return ConfigError(
            f"the network takes one time for all samples ({_first(text)}), and is told one for each, {_shape(time)}: wrap a "
            "function that asks it sample by sample, or time[0] where they are all alike"
        )
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
        hint = null_class_hint(network, labels.shape[-1])
        ways.append(
            f'labels="index" tells it classes by number, not as one-hot rows, {hint} which of them is none, if any'
        )
    ways = ways or ["wrap a function that makes an index of what it is told"]
    return TableError(
        f"the network looks up a table, which takes whole numbers, and was told floating ones ({_first(text)}): "
        f"{'; '.join(ways)}"
    )


def _wrong_size(text: str, labels: Tensor | None) -> ConfigError:
    """For a layer that is not of the size of what it got, which may be of the samples or of the classes."""
    told, check = "", ""
    if labels is not None:
        told = f", classes as {'one-hot rows' if labels.is_floating_point() else 'an index'} {_shape(labels)} among it"
        check = ', label_dim, and labels="rows" or "index" (null_class tells an index)'
    return ConfigError(f"a layer of the network is not of the size of what it got ({text}){told}: check shape{check}")


def _shape(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _first(text: str) -> str:
    return text.partition("\n")[0].partition(" instead")[0].rstrip(".")
