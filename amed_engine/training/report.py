"""What a training run shows: a progress bar, a table of its history and a picture of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from tqdm import tqdm

from amed_engine.errors import require
from amed_engine.solvers.files import atomic_write
from amed_engine.solvers.targets import check_folder
from amed_engine.training.trainer import Round

FILES = ("history.csv", "history.png")


def show(bar: tqdm, seen: Round) -> None:
    """Loss, r and scales of every interval behind the bar."""
    r, scale_dir, scale_time = zip(*seen.midpoints, strict=True)
    fields = {"loss": seen.losses, "r": r, "dir": scale_dir, "time": scale_time}
    text = {name: " ".join(f"{value:.3g}" for value in values) for name, values in fields.items()}
    bar.set_postfix(text | ({"skipped": seen.skipped} if seen.skipped else {}), refresh=False)
    bar.update()


def table(history: list[Round]) -> str:
    """CSV: images, skipped, a column per loss, and r, scale_dir and scale_time of every interval; a row per batch."""
    intervals = range(len(history[0].midpoints))
    columns = ["images", "skipped", *(f"loss_{k}" for k in range(len(history[0].losses)))]
    columns += [f"{name}_{i}" for i in intervals for name in ("r", "scale_dir", "scale_time")]
    lines = [columns, *([f"{value:.9g}" for value in seen.row()] for seen in history)]
    return "".join(",".join(line) + "\n" for line in lines)


def import_figure() -> Any:
    """matplotlib's Figure, or an error that says how to install it."""
    return require("matplotlib.figure", "plot", "the plot in out_dir", "leave out_dir out").Figure


def prepare(folder: str | Path) -> None:
    """Before the training: whether the picture can be drawn, and the folder written to."""
    import_figure()
    check_folder(folder, *FILES)


def plot(history: list[Round]) -> bytes:
    """A PNG: the losses, r and the two scales over the images seen, a line per interval."""
    figure = import_figure()(figsize=(11, 6), layout="constrained")
    images = [seen.images for seen in history]
    lines = {"loss": [seen.losses for seen in history]}
    for k, name in enumerate(("r", "scale_dir", "scale_time")):
        lines[name] = [[midpoint[k] for midpoint in seen.midpoints] for seen in history]
    for axes, (name, rows) in zip(figure.subplots(2, 2).flat, lines.items(), strict=True):
        for i, values in enumerate(zip(*rows, strict=True)):
            axes.plot(images, values, label=f"interval {i}")
        axes.set(title=name, xlabel="images", yscale="log" if name == "loss" else "linear")
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def save(folder: str | Path | None, history: list[Round], picture: bool) -> None:
    """history.csv, and history.png with `picture`; nothing without a folder or a history."""
    if folder is None or not history:
        return
    figures, drawn = (Path(folder) / name for name in FILES)
    atomic_write(figures, table(history).encode())
    if picture:
        atomic_write(drawn, plot(history))
