"""What `print(denoiser)` says: what was inferred of a network, and why."""

from __future__ import annotations

from typing import Any

import torch

from amed_engine.adapters.compiled import compiled_of
from amed_engine.adapters.conditions import Conditions
from amed_engine.adapters.facts import NetworkFacts
from amed_engine.adapters.family import Family
from amed_engine.sampling.modules import bare, dtype_of

_WHOLE = "the network takes whole numbers: fractions are rounded to the nearest, the other coefficients stay exact"


def notes_of(
    model: Any, facts: NetworkFacts, family: Family, why: str, tables: Conditions, bottleneck: str
) -> dict[str, str]:
    """A line on each thing that was inferred, by name."""
    dtype = dtype_of(model)
    letters = ", ".join(facts.axes or "CHW")
    shape = f"not known: pass shape=({letters}) to Sampler" if facts.shape is None else str(tuple(facts.shape))
    if facts.shape is not None and facts.out_channels == 2 * facts.shape[facts.channel_axis]:
        shape += ", learned variances cut off"
    numbers = {"float": "none; a number per sample (B,)", "vector": f"none; {facts.label_dim} numbers per sample"}
    classes = numbers.get(facts.labels, f"{facts.label_dim}") if facts.label_dim else "none"
    none = "" if facts.null_class is None else f", {facts.null_class} meaning no class"
    if facts.label_dim and facts.labels == "rows" and not facts.prediction:
        none = ", told as one-hot rows; zeros mean no class, where it was trained so"
    bound = f", {tables.count} bound" if tables.count else ", given in each call" if tables.names else ""
    return {
        "network": type(bare(model)).__name__,
        "predicts": f"{family.describe()} ({why})",
        **({"time": _WHOLE} if facts.whole_times else {}),
        "sigma": f"{family.sigma_min:.4g} to {family.sigma_max:.4g}",
        "samples": shape,
        "classes": classes + none,
        "conditions": (", ".join(tables.names) or "none") + bound + (", with null" if tables.has_null else ""),
        "bottleneck": bottleneck,
        "precision": _precision(model, dtype),
    }


def _precision(model: Any, dtype: torch.dtype | None) -> str:
    if (compiled := compiled_of(model)) is not None:
        return f"network {compiled.describe()}, state x's"
    return "x's" if dtype is None else f"network {dtype}, state x's".replace("torch.", "")
