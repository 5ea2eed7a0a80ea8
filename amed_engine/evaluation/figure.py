"""The picture of a comparison: images of every solver beside their errors, and the errors' curves. Needs matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from amed_engine.engine.images import grid, to_uint8
from amed_engine.errors import require
from amed_engine.evaluation.comparison import CURVE_NFES, TRAINING_FREE, Comparison, Score

# One colour per family in the order of the solvers, one dash per order; what is learned is black.
PALETTE = ("gray", "brown", "olive", "blue", "green", "orange", "red", "purple", "pink", "cyan")
DASHES = {"2": "--", "3": "-", "4": ":"}


def import_matplotlib() -> Any:
    """matplotlib.figure, or an error that says how to install it."""
    return require("matplotlib.figure", "plot", "the picture")


def plot(comparison: Comparison) -> bytes:
    """A PNG: left, a row of images per solver, best first; right, the curves, if there are any."""
    rows = [comparison.reference, *comparison.rows]
    widths = [0.62 * len(comparison.seeds) + 0.3, 5.5 if comparison.curves else 0.0]
    figure = import_matplotlib().Figure(figsize=(sum(widths) + 4.2, 0.62 * len(rows) + 1.4), layout="constrained")
    panels = 2 if comparison.curves else 1
    axes = figure.subplots(1, panels, squeeze=False, width_ratios=widths[:panels])[0]
    figure.suptitle(
        f"{Path(comparison.model).name}, {comparison.nfe} network evaluations: distance to the exact solution "
        f"(RMSE over {comparison.samples} samples)"
    )
    _draw_rows(axes[0], rows, comparison.seeds)
    if comparison.curves:
        _draw_curves(axes[1], comparison)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_rows(axes: Any, rows: list[Score], seeds: list[int]) -> None:
    pictures = np.concatenate([to_uint8(row.images) for row in rows])
    sheet = grid(pictures, columns=len(seeds))
    axes.imshow(sheet.repeat(3, axis=2) if sheet.shape[2] == 1 else sheet)
    down, across = sheet.shape[0] / len(rows), sheet.shape[1] / len(seeds)
    axes.set_xticks([across * (i + 0.5) for i in range(len(seeds))], seeds)
    axes.set_yticks([down * (i + 0.5) for i in range(len(rows))], [row.name for row in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("seed")
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(style(row.name)[0])
    for i, row in enumerate(rows):
        # The reference has no error: its place is the column's head.
        text, weight = (f"{row.rmse:.4f}", "normal") if i else ("RMSE", "bold")
        axes.text(1.02, 1 - (i + 0.5) / len(rows), text, transform=axes.transAxes, va="center", weight=weight)


def _draw_curves(axes: Any, comparison: Comparison) -> None:
    for name, points in comparison.curves.items():
        colour, dash = style(name)
        emphasis = {"marker": "*", "markersize": 12, "linewidth": 2.5, "zorder": 3} if colour == "black" else {}
        look = {"marker": "o", "markersize": 3.5, "linewidth": 1.3, **emphasis}
        axes.plot(list(points), list(points.values()), color=colour, linestyle=dash, label=name, **look)
    axes.set(yscale="log", xticks=list(CURVE_NFES), xlabel="network evaluations (NFE)", ylabel="RMSE")
    axes.set_title(f"error against NFE ({comparison.curve_samples} samples)", fontsize="medium")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize="small", ncols=2)


def style(name: str) -> tuple[str, str]:
    """Colour and dash of a solver such as "ipndm-3" or "dpmpp-2 noise"."""
    families = list(dict.fromkeys(family for family, _ in map(_split, TRAINING_FREE)))
    family, order = _split(name)
    colour = f"tab:{PALETTE[families.index(family) % len(PALETTE)]}" if family in families else "black"
    return colour, DASHES.get(order, "-")


def _split(name: str) -> tuple[str, str]:
    """A solver's family, "dpmpp noise", and its order, "2" or nothing."""
    order = "".join(c for c in name if c.isdigit())
    return name.replace(f"-{order}", ""), order
