"""Checks of single arguments, which a file may have given: types, ranges and lengths. Each raises ConfigError."""

from __future__ import annotations

import math
import reprlib
import sys
from numbers import Integral, Real
from typing import Any

from amed_engine.errors import ConfigError

HUGE = 1 << 62  # beyond any size of a tensor
MOST_EVALUATIONS = 1 << 20
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlist = _short.maxtuple = _short.maxdict = 16


def told(value: Any) -> str:
    """A value for a message, whatever a file made it: no longer than a line."""
    try:
        return _short.repr(value)
    except ValueError:  # of an integer of thousands of digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def plain(value: Any) -> Any:
    """A setting with NumPy's numbers as Python's, which JSON knows; also those in lists."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def is_whole(value: Any, low: int, high: int = HUGE) -> bool:
    """Whether it is an integer, NumPy's too, from low to high."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def is_finite(value: Any) -> bool:
    """Whether it is a Python number, neither infinite nor beyond float64."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def in_range(owner: str, name: str, value: Any, low: int, high: int = HUGE) -> None:
    if not is_whole(value, low, high):
        expected = f"from {low} to {high}" if high < HUGE else f"of at least {low}"
        raise ConfigError(f"{owner}: {name} must be an integer {expected}, got {told(value)}")


def is_bool(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{owner}: {name} must be True or False, got {told(value)}")


def one_of(owner: str, name: str, value: Any, valid: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in valid:
        raise ConfigError(f"{owner}: {name} must be one of {', '.join(valid)}; got {told(value)}")


def is_number(owner: str, name: str, value: Any, what: str = "a finite number") -> float:
    """The number as a float."""
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value):
            return float(value)
    except OverflowError:
        pass
    raise ConfigError(f"{owner}: {name} must be {what}, got {told(value)}")


def is_fraction(owner: str, name: str, value: Any, closed: bool = False) -> None:
    """In [0, 1), or [0, 1] where closed."""
    what = f"a number in [0, 1{']' if closed else ')'}"
    number = is_number(owner, name, value, what)
    if not (0 <= number < 1 or (closed and number == 1)):
        raise ConfigError(f"{owner}: {name} must be {what}, got {told(value)}")


def is_positive(owner: str, name: str, value: Any) -> None:
    if not 0 < is_number(owner, name, value, "a positive number") < math.inf:
        raise ConfigError(f"{owner}: {name} must be a positive number, got {told(value)}")


def is_list(owner: str, name: str, value: Any, low: int, high: int, what: str) -> list:
    """Its entries."""
    if not isinstance(value, (list, tuple)) or not low <= len(value) <= high:
        raise ConfigError(f"{owner}: {name} must be a list of {low} to {high} {what}, got {told(value)}")
    return list(value)


def check_nfe(nfe: Any) -> int:
    """A number of evaluations, NumPy's integers too. Raises ConfigError."""
    if not is_whole(nfe, 1):
        raise ConfigError(f"nfe must be a positive integer, got {told(nfe)}")
    if nfe > MOST_EVALUATIONS:
        raise ConfigError(f"nfe must be at most {MOST_EVALUATIONS}, got {told(nfe)}")
    return int(nfe)
