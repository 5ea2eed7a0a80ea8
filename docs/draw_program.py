"""A picture of programs' coefficients, one matrix an evaluation: python docs/draw_program.py docs/program.png

Rows are what an update writes, columns what it reads; the colour is the coefficient. The numbers stand in the file too, as JSON
in its text "coefficients".
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amed_engine import Plan, make_plan
from amed_engine.solvers.stage import Update

PLANS = (
    make_plan(4, solver="ipndm", options={"max_order": 3}, schedule="logsnr", sigma_max=16.0, sigma_min=1.0, afs=False),
    make_plan(4, solver="unipc", options={"max_order": 2}, schedule="logsnr", sigma_max=16.0, sigma_min=1.0, afs=False),
)


def rows(update: Update) -> list[str]:
    """What the update writes."""
    moved = ["x'"] if update.moves_x else []
    return ["d"] * update.new_directions + moved + ([] if update.x_is_y else ["y'"])


def columns(update: Update, y_is_x: bool, past: int) -> list[str]:
    """What the update reads."""
    named = ["x", *([] if y_is_x else ["y"]), "D", *(f"d{k + 1}" for k in range(past))]
    return [named[j] for j in update.columns]


def draw(axes: Axes, update: Update, y_is_x: bool, past: int) -> None:
    values = update.coeffs[..., 0].numpy()
    axes.imshow(values, cmap="RdBu_r", vmin=-2.5, vmax=2.5, aspect="equal")
    for (i, j), value in np.ndenumerate(values):
        if value:
            color = "white" if abs(value) > 1.5 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(values.shape[1]), columns(update, y_is_x, past))
    axes.set_yticks(range(values.shape[0]), rows(update))
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)


def coefficients(plans: tuple[Plan, ...]) -> list:
    """What is drawn: plan by plan, evaluation by evaluation, row by row."""
    return [[update.coeffs[..., 0].tolist() for (update,) in plan.program().updates or ()] for plan in plans]


def picture(plans: tuple[Plan, ...]) -> Figure:
    figure = Figure(figsize=(11, 2.6 * len(plans)), layout="constrained")
    grid = figure.subplots(len(plans), max(plan.intervals for plan in plans), squeeze=False)
    for plan, line in zip(plans, grid, strict=True):
        updates = plan.program().updates or ()
        y_is_x, past = True, 0
        for axes, sigma, (update,) in zip(line, plan.sigmas, updates, strict=False):
            draw(axes, update, y_is_x, past)
            axes.set_title(f"{plan.solver}, sigma {sigma:g}", fontsize=9)
            y_is_x, past = update.x_is_y, update.keep
    return figure


def main(path: Path) -> None:
    picture(PLANS).savefig(path, dpi=120, metadata={"coefficients": json.dumps(coefficients(PLANS))})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
