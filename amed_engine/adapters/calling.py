"""How a network that no reader knows wants to be called: which of its arguments are the noise level and the classes."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

import torch
from torch import nn

from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import bare, bound


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TIMES = _names(
    """t ts time times timestep timesteps time_step time_steps step steps sigma sigmas noise_level noise_levels noise_labels
    time_cond c_noise cond_noise noise_cond log_snr logsnr"""
)
LABELS = _names("y label labels class_label class_labels class_id class_ids classes")
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_FUNCTION = "wrap a function that calls it, such as lambda x, t: network(x, time=t)"


@dataclass(frozen=True)
class Calling:
    """Names under which noise level and classes are given, None: by position. time_first: before the state."""

    time: str | None = None
    labels: str | None = None
    time_first: bool = False

    def arguments(self, x: Any, time: Any, labels: Any) -> tuple[list[Any], dict[str, Any]]:
        """Those by position and those by name."""
        placed = [x] if self.time else [time, x] if self.time_first else [x, time]
        named = {self.time: time} if self.time else {}
        if labels is not None and self.labels:
            return placed, named | {self.labels: labels}
        return placed + ([] if labels is None else [labels]), named


def calling_of(network: Any, given: Collection[str], classes: int) -> Calling:
    """(x, time[, labels]) by position, unless the signature says otherwise.

    given: names of the conditions of each call. Raises ConfigError where no argument, or more than one, can be the noise level
    or the classes, and for one that nobody gives.
    """
    known = _parameters(bare(network))
    if known is None or any(each.kind is Parameter.VAR_POSITIONAL for each in known):
        return Calling()
    taken = {*given, *bound(network)}
    free = [each for each in known if each.name not in taken and each.kind is not Parameter.VAR_KEYWORD]
    told = _signature(network, known)
    time = _time(free, told)
    rest = [each for each in free[1:] if each is not time] if time is not free[0] else free[2:]
    labels = _labels(rest, told) if classes else None
    _check_given([each for each in rest if each is not labels], told, classes)
    first = time is free[0]
    placed = (first or time is known[1]) and time.kind in _POSITIONAL
    third = placed and labels is not None and labels is known[2] and labels.kind in _POSITIONAL
    return Calling(None if placed else time.name, None if labels is None or third else labels.name, first)


def _parameters(network: Any) -> list[Parameter] | None:
    """None where nothing tells: scripted modules, callables of C."""
    if isinstance(network, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        return None
    usual = isinstance(network, nn.Module) and type(network).__call__ is nn.Module.__call__
    try:
        return list(inspect.signature(network.forward if usual else network).parameters.values())
    except (TypeError, ValueError):
        return None


def _time(free: list[Parameter], told: str) -> Parameter:
    """The argument of the noise level: the one named so, else the second that has to be given."""
    first, second = free[0] if free else None, free[1] if len(free) > 1 else None
    if first is not None and second is not None and _is_time(first) and not _is_time(second):
        return first  # (t, x)
    named = [each for each in free[1:] if _is_time(each)]
    found = [each for each in named if each.default is Parameter.empty] or named
    if len(found) > 1:
        raise ConfigError(f"{told}: which of {', '.join(each.name for each in found)} is the noise level? {_FUNCTION}")
    if found:
        return found[0]
    if second is None or second.default is not Parameter.empty or second.name.lower() in LABELS:
        raise ConfigError(f"{told} has no argument that is known to be the noise level; {_FUNCTION}")
    return second


def _is_time(parameter: Parameter) -> bool:
    return parameter.name.lower() in TIMES


def _labels(rest: list[Parameter], told: str) -> Parameter:
    """The argument of the classes: the one named so, else the first that follows."""
    found = [each for each in rest if each.name.lower() in LABELS] or rest[:1]
    if len(found) != 1:
        names = ", ".join(each.name for each in found) or "none of its arguments"
        raise ConfigError(f"label_dim says that there are classes, but of {told} {names} can be told them; {_FUNCTION}")
    return found[0]


def _check_given(rest: list[Parameter], told: str, classes: int) -> None:
    missing = [each.name for each in rest if each.default is Parameter.empty]
    if missing:
        are_labels = missing[0].lower() in LABELS and not classes
        how = "label_dim= says how many classes there are" if are_labels else f"conditions=[{missing[0]!r}] names it"
        raise ConfigError(
            f"{told} needs {', '.join(missing)}, which nobody gives: {how}, or bind it with functools.partial"
        )


def _signature(network: Any, known: list[Parameter]) -> str:
    inner = bare(network)
    return f"{getattr(inner, '__name__', type(inner).__name__)}({', '.join(each.name for each in known)})"
