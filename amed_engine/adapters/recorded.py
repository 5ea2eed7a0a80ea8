"""What a plan records of the model it is for beside the fingerprint: the settings of our wrappers, which say what differs.

Of them a predictor that reads no bottleneck does not care which one is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from amed_engine.adapters import taps
from amed_engine.adapters.fingerprint import (
    BUFFER,
    TOLD,
    digest,
    hashed,
    is_model,
    model_weights,
    own_parts,
    settings_of,
)
from amed_engine.sampling.modules import bare, gathered
from amed_engine.solvers.plan import Plan

Wrapping = Mapping[str, Mapping[str, Any]]
KIND = "kind"
# What people call the settings.
NAMES = {"sigmas": "betas", "told": "guidance told to the network", "levels": "noise levels"}


def wrapping_of(model: Any) -> dict[str, dict[str, Any]] | None:
    """The settings of our wrappers by their places, outermost first, JSON-able; None where one is exported and tells none."""
    told: dict[str, dict[str, Any]] = {}
    for name, part, _ in own_parts(model):
        if (text := getattr(part, TOLD, None)) is None:
            return None
        kind, settings = json.loads(text)
        told[name.removesuffix(BUFFER)] = {KIND: kind, **settings}
    return told


def recorded_wrapping(plan: Plan) -> Wrapping | None:
    return None if plan.wrapping is None else json.loads(plan.wrapping)


def is_recorded(model: Any, plan: Plan, *, reads_bottleneck: bool) -> bool:
    """Whether a plan's fingerprint is this model's; for what reads no bottleneck, wherever `wrap` was told to read it."""
    recorded = plan.model or ""
    return is_model(model, recorded) or (not reads_bottleneck and recorded in elsewhere(model, recorded_wrapping(plan)))


def elsewhere(model: Any, wrapping: Wrapping | None) -> Iterator[str]:
    """The model's fingerprints as if its bottleneck were another: the recorded one, or without a record none and the one that
    `wrap` finds. Each reads all weights."""
    now = wrapping_of(model) or {}
    readers = {place: settings for place, settings in now.items() if "bottleneck" in settings}
    told = [settings.get("bottleneck", 0) for settings in (wrapping or {}).values()]
    known = [name for name in told if name is None or isinstance(name, str)]
    networks = [getattr(part, "network", None) for _, part, _ in own_parts(model) if hasattr(part, "bottleneck")]
    for bottleneck in dict.fromkeys(
        [None, *(taps.find(bare(each)) for each in networks)] if wrapping is None else known
    ):
        if any(settings["bottleneck"] != bottleneck for settings in readers.values()):
            other = {place: {**settings, "bottleneck": bottleneck} for place, settings in readers.items()}
            with gathered(model):
                yield digest(model_weights(model) | settings_of(model) | _buffers(other))


def _buffers(wrapping: Wrapping) -> dict[str, torch.Tensor]:
    """The buffers that the parts of these settings have."""
    texts = {place: [told.get(KIND), {n: v for n, v in told.items() if n != KIND}] for place, told in wrapping.items()}
    return {place + BUFFER: hashed(json.dumps(text, sort_keys=True)) for place, text in texts.items()}


def difference(model: Any, plan: Plan) -> str:
    """What differs between a model and the one that a plan was made for, in words, as far as it is known."""
    now, wrapping = wrapping_of(model), recorded_wrapping(plan)
    if wrapping is None:
        return "what differs is not known: it was written by an earlier version, without the settings"
    if now is None:
        return "what differs is not known: the model is exported and tells no settings"
    then, here = _by_kind(wrapping), _by_kind(now)
    found = [f"{kind} ({'only then' if kind in then else 'only here'})" for kind in then.keys() ^ here.keys()]
    for kind in then.keys() & here.keys():
        found += _entries(then[kind], here[kind])
    same = _has_weights(model, plan.model or "", wrapping, now)
    told = [*([] if same else ["the weights"]), *sorted(found)]
    return f"what differs: {', '.join(told)}{'; wrap the network as it was then' if same else ''}"


def _by_kind(wrapping: Wrapping) -> dict[str, Mapping[str, Any]]:
    return {str(settings.get(KIND)): settings for settings in wrapping.values()}


def _entries(then: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Settings of one kind of wrapper that differ; of another family only what both families have."""
    said, says = _prediction(then), _prediction(here)
    found = [] if said == says else [f"prediction ({said!r} then, {says!r} here)"]
    names = then.keys() | here.keys() if then.get("family") == here.get("family") else then.keys() & here.keys()
    for name in sorted(names - {KIND, "family", "predicts"}):
        if then.get(name) != here.get(name):
            found.append(f"{NAMES.get(name, name)} ({_show(then.get(name))} then, {_show(here.get(name))} here)")
    return found


def _prediction(settings: Mapping[str, Any]) -> str:
    return str(settings.get("predicts", settings.get("family")))[:40]


def _show(value: Any) -> str:
    """A table by its length and its ends."""
    if isinstance(value, list) and len(value) > 3:
        return f"{value[0]} levels from {value[1]} to {value[-1]}"
    return repr(value)[:60]


def _has_weights(model: Any, recorded: str, wrapping: Wrapping, now: Wrapping) -> bool:
    """Whether the model in the recorded wrapping has the recorded fingerprint: names are those of the places then."""
    there, here = _network_at(wrapping), _network_at(now)
    with gathered(model):
        weights = {
            there + n.removeprefix(here): value for n, value in model_weights(model).items() if n.startswith(here)
        }
        others = {name: value for name, value in settings_of(model).items() if not name.endswith(BUFFER)}
        return recorded == digest(weights | others | _buffers(wrapping))


def _network_at(wrapping: Wrapping) -> str:
    """Where the network is inside its wrappers."""
    inner = max(wrapping, key=len, default=None)
    if inner is None:
        return ""
    return inner + ("network." if wrapping[inner].get(KIND) == "Adapter" else "denoiser.")
