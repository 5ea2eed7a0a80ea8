"""A one-step generator that nobody here trained: the consistency network of adaptive-terrain-diffusion 0.4.2 (PyPI, MIT).

    python benchmarks/terrain.py check
    python benchmarks/terrain.py draw --out terrain.png

An ONNX file of f(x, sigma; difficulty) for heights of 1 x 128², by Youwei Yu, the difficulty from 0 to 1 for each sample.
`check` draws with the package's own generator and with `Sampler(solver="consistency", nfe=1)` from the same noise. The network
sees x in -1 .. 1, with heights in metres

    h = sinh((x + 1)/2 · asinh(22.16864 / 0.1)) · 0.1

`draw` says how rough its terrains are, and what a second evaluation makes of them. It was distilled at its highest noise level,
and is a consistency function only near it: from levels below 20 it leaves noise behind. One evaluation is what it is for.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import zipfile
from pathlib import Path

import click
import numpy as np
import torch
import wheels
from torch import Tensor

from amed_engine import Sampler, wrap
from amed_engine.adapters import Adapter, load_onnx
from amed_engine.checkpoints import atomic_write
from amed_engine.engine.images import grid, png, to_uint8

PACKAGE = "adaptive-terrain-diffusion==0.4.2"
WHEEL = "adaptive_terrain_diffusion-0.4.2-py3-none-any.whl"
SHA256 = "dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d"
WEIGHTS = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
FOLDER = Path(tempfile.gettempdir()) / "terrain"
SHAPE, RANGE, SCALE, LEVELS = (1, 128, 128), 22.16864013671875, 0.1, 100
SAME = 1e-5  # metres


def download(folder: Path) -> Path:
    """The wheel in this folder; see `wheels.download`."""
    return wheels.download(folder, PACKAGE, WHEEL, SHA256)


def network(wheel: Path) -> Path:
    """The ONNX file beside its wheel."""
    path = wheel.parent / Path(WEIGHTS).name
    with zipfile.ZipFile(wheel) as archive:
        atomic_write(path, archive.read(WEIGHTS))
    return path


def sampler(model: Adapter, middle: float | None = None) -> Sampler:
    """One evaluation, or a second one from the noise level `middle`."""
    levels = [80.0, 0.002] if middle is None else [80.0, middle, 0.002]
    return Sampler(model, solver="consistency", schedule=torch.tensor(levels))


def condition(difficulty: int) -> float:
    """What the network is told of a difficulty from 1 to 100."""
    return (difficulty - 1) / (LEVELS - 1)


def heights(images: Tensor) -> Tensor:
    """Metres of what the network answers."""
    return torch.sinh((images[:, 0].double() + 1).div(2).clamp(0, 1) * np.arcsinh(RANGE / SCALE)) * SCALE


def roughness(metres: Tensor) -> tuple[float, float]:
    """Standard deviation of the heights, and mean difference of neighbours, in metres; the mean over terrains."""
    steps = torch.cat([metres.diff(dim=1).abs().flatten(1), metres.diff(dim=2).abs().flatten(1)], 1)
    return float(metres.flatten(1).std(1).mean()), float(steps.mean())


def numbers(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    from amed_engine.engine.seeds import parse_seeds

    return parse_seeds(text, option.name or "numbers")


@click.group()
def app() -> None:
    """A one-step generator of terrains, drawn by this engine."""


@app.command()
@click.option("--difficulty", type=click.IntRange(1, LEVELS), default=50)
@click.option("--count", type=click.IntRange(min=1), default=4)
def check(difficulty: int, count: int) -> None:
    """Compare one step with the package's own generator, on the same noise."""
    wheel = download(FOLDER)
    path = network(wheel)
    sys.path.insert(0, str(wheel))
    from terrain_diffusion import TerrainGenerator  # pyright: ignore[reportMissingImports]

    theirs = TerrainGenerator(path, device="cpu").generate(count, difficulty=difficulty, seed=7, zero_floor=False)
    noise = np.random.default_rng(7).standard_normal((count, *SHAPE), dtype=np.float32)
    mine = sampler(wrap(load_onnx(path), "consistency"))
    ours = heights(mine.run(torch.from_numpy(noise), condition(difficulty)).images)
    difference = float((ours - torch.from_numpy(theirs).double()).abs().max())
    click.echo(f"{count} terrains of {theirs.min():.3g} to {theirs.max():.3g} m differ by at most {difference:.2g} m")
    if not difference <= SAME:
        raise click.ClickException(f"expected at most {SAME:g} m")


@app.command()
@click.option("--middle", type=float, multiple=True, default=(60, 20, 2.5, 0.5), help="Level of a second evaluation.")
@click.option("--difficulty", callback=numbers, default="1,50,100", help="From 1 to 100.")
@click.option("--count", type=click.IntRange(min=1), default=4, help="Seeds, from 0 on.")
@click.option("--out", type=click.Path(dir_okay=False), help="A PNG: a row for each line of the table.")
def draw(middle: tuple[float, ...], difficulty: list[int], count: int, out: str | None) -> None:
    """Draw terrains with one evaluation and with two, and say how rough they are."""
    model, pictures = wrap(load_onnx(network(download(FOLDER))), "consistency"), []
    click.echo(f"{'difficulty':>10}  {'second from':>11}  {'deviation':>9}  {'neighbours':>10}")
    for each, level in itertools.product(difficulty, (None, *middle)):
        images = sampler(model, level).run(range(count), condition(each)).images
        spread, steps = roughness(heights(images))
        click.echo(f"{each:>10}  {level or 'none':>11}  {spread:9.3f}  {steps:10.4f}")
        pictures.append(to_uint8(images))
    if out:
        atomic_write(out, png(grid(np.concatenate(pictures), columns=count)))


if __name__ == "__main__":
    app()
