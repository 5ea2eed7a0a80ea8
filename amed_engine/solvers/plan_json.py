"""What a plan's JSON must hold: the present version, and how the one before it is meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amed_engine.errors import ConfigError
from amed_engine.solvers import SOLVERS
from amed_engine.solvers.mean import NAMES
from amed_engine.solvers.schedule import SCHEDULES

VERSION = 2  # of plans in files; those of the first have none
MAX_LEVELS = 10_000  # in files: what is made of a plan takes some 100 us for each


_TYPES: dict[str, tuple[type, ...]] = {
    "solver": (str,),
    "sigmas": (list, tuple),
    "schedule": (str,),
    "rho": (int, float, type(None)),
    "options": (dict,),
    "afs": (bool, str),
    "denoise_to_zero": (bool,),
    "midpoint": (bool,),
    "guidance_scale": (int, float, type(None)),
    "model": (str, type(None)),
    "dtype": (str, type(None)),
    "mean": (dict, type(None)),
    "wrapping": (dict, type(None)),
}
OPTIONAL = ("wrapping",)  # later than version 2, and for people: what is left out is not known


def as_first_meant(solver: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A solver's options as files without a version mean them: thresholding was on where it was not named."""
    return {**({"thresholding": True} if "thresholding" in _defaults_of(solver) else {}), **options}


def _defaults_of(solver: str) -> dict[str, Any]:
    return SOLVERS[solver].defaults() if solver in SOLVERS else {}


def current(data: Mapping, usual: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's JSON as this version has it, its entries checked. usual: what entries are that older files leave out.

    Raises ConfigError.
    """
    said: dict[str, Any] = {name: value for name, value in data.items() if name != "version"}
    if "version" in data:
        _check_version(data["version"])
    if missing := [name for name in ("solver", "sigmas") if name not in said]:
        raise ConfigError(f"plan lacks {', '.join(missing)}")
    if unknown := sorted(set(map(str, said)) - set(_TYPES)):
        raise ConfigError(f"plan has unknown entries {', '.join(unknown)[:200]}; expected {', '.join(sorted(_TYPES))}")
    if "version" not in data:
        said = _of_version_1(said, usual)
    said = {**dict.fromkeys(OPTIONAL), **said}
    if missing := [name for name in _TYPES if name not in said]:
        raise ConfigError(f"plan lacks {', '.join(missing)}; version {VERSION} says everything, null for none")
    _check_types(said)
    every = _defaults_of(said["solver"]) if "version" in data else {}
    if missing := [name for name in every if name not in said["options"]]:
        defaults = ", ".join(f"{name}={every[name]}" for name in missing)
        raise ConfigError(
            f"plan entry 'options' lacks {', '.join(missing)}; version {VERSION} says every option, by default {defaults}"
        )
    return said


def _check_version(version: Any) -> None:
    if type(version) is int and version > VERSION:
        raise ConfigError(
            f"a plan of version {version} is not known here, where {VERSION} is the newest; a newer amed_engine wrote it: "
            "update this one"
        )
    if type(version) is not int or version != VERSION:
        raise ConfigError(
            f"plan entry 'version' must be the number {VERSION}, got {str(version)[:40]!r}; plans of the first have none"
        )


def _of_version_1(said: dict[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What plans without a version say, in the words of this one."""
    if "mean" in said:
        raise ConfigError('plan has unknown entries mean; plans without a version have none: put "version": 2 back')
    afs, options = said.get("afs", False), said.get("options", {})
    if not isinstance(afs, bool):
        raise ConfigError(f"plan entry 'afs' has type {type(afs).__name__}, expected bool")
    if isinstance(said["solver"], str) and isinstance(options, Mapping):
        options = as_first_meant(said["solver"], options)
    return {**usual, **said, "options": options, "afs": NAMES[afs]}


def _check_types(data: Mapping) -> None:
    for name, value in data.items():
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and bool not in _TYPES[name]):
            expected = [kind.__name__ for kind in _TYPES[name] if kind not in (tuple, type(None))]
            raise ConfigError(f"plan entry {name!r} has type {type(value).__name__}, expected {' or '.join(expected)}")
    for name in ("rho", "guidance_scale"):
        if data.get(name) is not None and not -1e9 < data[name] < 1e9:
            raise ConfigError(f"plan entry {name!r} must be a finite number, got {str(data[name])[:40]}")
    if data.get("schedule", "custom") not in (*SCHEDULES, "custom"):
        raise ConfigError(
            f"plan entry 'schedule' must be custom, {', '.join(SCHEDULES)}; got {data['schedule'][:40]!r}"
        )
    if not all(isinstance(settings, dict) for settings in (data["wrapping"] or {}).values()):
        raise ConfigError("plan entry 'wrapping' must hold an object for each place")
    if len(data["sigmas"]) > MAX_LEVELS:
        raise ConfigError(
            f"plan entry 'sigmas' has {len(data['sigmas'])} numbers, more than the {MAX_LEVELS} that it may have"
        )
    if not all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in data["sigmas"]):
        raise ConfigError("plan entry 'sigmas' must be a list of numbers")
