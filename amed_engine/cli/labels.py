"""`--class` of the commands: a class or a number, several of them, or a file with a line for each sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

HELP = "Class of all samples; or the number or numbers that the model is told, 0.3 or 0.3,0.7; or a file, a line per sample."


def parse_labels(context: click.Context, option: click.Parameter, text: str | None) -> Any:
    """A number, a list of them, or a list of lists from a file; None stays None. Raises click.BadParameter."""
    if text is None:
        return None
    if Path(text).is_file():
        try:
            rows = _rows(Path(text).read_text(encoding="utf-8").splitlines())
        except ValueError as error:  # a UnicodeDecodeError too
            raise click.BadParameter(
                f"file {text} must hold a line of numbers per sample, as many in each: {error}", context, option
            ) from error
        return [row[0] for row in rows] if len(rows[0]) == 1 else rows
    if (numbers := _numbers(text)) is None:
        raise click.BadParameter(
            f"{text!r} is neither a number, nor several as 0.3,0.7, nor a file of them that is there", context, option
        )
    return numbers if "," in text else numbers[0]


def _rows(lines: list[str]) -> list[list[float]]:
    """The numbers of each line that has any. Raises ValueError."""
    rows: list[list[float]] = []
    for place, line in enumerate(lines, 1):
        if (row := _numbers(line)) is None:
            raise ValueError(f"line {place} is {line.strip()[:40]!r}")
        if row and rows and len(row) != len(rows[0]):
            raise ValueError(f"line {place} has {len(row)} numbers, those before have {len(rows[0])}")
        rows.extend([row] if row else [])
    if not rows:
        raise ValueError("it has none")
    return rows


def _numbers(text: str) -> list[float] | None:
    """Numbers between commas or blanks, whole ones as integers; None for anything else."""
    try:
        return [int(part) if part.lstrip("+-").isdecimal() else float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        return None


label_option = click.option(
    "--class", "class_labels", metavar="NUMBERS", callback=parse_labels, help=HELP, show_default="drawn by each seed"
)


def in_turn(labels: Any, network: Any, batch: int) -> list[Any] | None:
    """Conditions for training batches: the labels that were given, over and over. Raises ConfigError."""
    import torch

    from amed_engine.engine.request import check_labels
    from amed_engine.engine.resolve import resolve

    if labels is None:
        return None
    model = resolve(network)
    several = isinstance(labels, list) and (model.label_dim == 1 or not model.continuous or isinstance(labels[0], list))
    rows = check_labels(labels, model, len(labels) if several else 1, True)
    entries = -(-len(rows) // batch)
    return [rows[(torch.arange(batch, device="cpu") + batch * k) % len(rows)] for k in range(entries)]
