"""`amed reproduce`: a published evaluation again, samples and FID."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import click

from amed_engine.cli.options import check_writable_folder, default_device


@click.command()
@click.argument("name", required=False)
@click.option("--list", "show", is_flag=True, help="Print all recipes with their published FID.")
@click.option(
    "--weights", type=click.Path(exists=True), help="File or folder of the model.", show_default="AMED_WEIGHTS"
)
@click.option(
    "--predictor", type=click.Path(exists=True), help="Of a learned method.", show_default="beside the weights"
)
@click.option(
    "--prompts", type=click.Path(exists=True, dir_okay=False), help="File of a text-to-image recipe, .csv or .txt."
)
@click.option("--statistics", type=click.Path(exists=True, dir_okay=False), help="Reference statistics, EDM's .npz.")
@click.option("--features", default="inception", help="What the distance is over: inception, pixels.")
@click.option("--images", type=click.IntRange(min=2), help="How many samples.", show_default="as published")
@click.option("--batch", type=click.IntRange(min=1), default=64, help="Samples at once.")
@click.option("--device", help="Where to run.", show_default="a GPU where there is one")
@click.option("--outdir", type=click.Path(file_okay=False), help="Write the images too.")
@click.option("--overwrite", is_flag=True, help="With --outdir: replace images of something else.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def reproduce(name, show, device, statistics, features, images, batch, outdir, overwrite, as_json, **parts) -> None:
    """Run a published evaluation, e.g. cifar10-amed-5, and compare with the number in the table."""
    from amed_engine.evaluation.metrics import frechet
    from amed_engine.evaluation.published.recipes import load_recipe, recipe_names
    from amed_engine.evaluation.published.reproduce import origin_of, prepare

    if show:
        click.echo("\n".join(f"{each:<28} {load_recipe(each).fid:g}" for each in recipe_names()))
        return
    if name is None:
        raise click.UsageError("name a recipe, e.g. cifar10-amed-5, or --list them")
    recipe = load_recipe(name)
    if outdir:
        check_writable_folder(outdir)
    drawing = prepare(recipe, device=device or default_device(), batch=batch, **parts)
    seeds = range(images or recipe.images)
    save = None
    if outdir:
        origin = origin_of(recipe, drawing, seeds)
        origin.check(outdir, seeds, True, overwrite)
        save = functools.partial(_save, outdir, origin, overwrite)
    stream, measured = _drawn(drawing, seeds, batch, save), None
    if statistics is not None:
        measured = float(frechet(stream, statistics, features, drawing.sampler.device))
    for _ in stream:  # all of them, where nothing measures them
        pass
    _report(recipe, drawing.sampler, len(seeds), measured, features, as_json)


def _save(outdir: str, origin: Any, overwrite: bool, pictures: Any, seeds: range) -> None:
    from amed_engine.engine import images

    rows, notes = list(pictures.permute(0, 2, 3, 1).numpy()), origin.notes(seeds)
    images.save_each(outdir, rows, seeds, True, notes=notes, overwrite=overwrite)


def _drawn(drawing: Any, seeds: range, batch: int, save: Callable[[Any, range], None] | None) -> Iterator[Any]:
    """Images batch by batch, under a progress bar where stderr is a terminal; with `save`, written on the way."""
    from tqdm import tqdm

    from amed_engine.evaluation.published.reproduce import draw

    starts = range(0, len(seeds), batch)
    with tqdm(total=len(seeds), desc="reproduce", unit="image", disable=None) as bar:
        for start, pictures in zip(starts, draw(drawing, seeds, batch), strict=True):
            if save is not None:
                save(pictures, seeds[start : start + batch])
            yield pictures
            bar.update(len(pictures))


def _report(recipe: Any, sampler: Any, count: int, measured: float | None, features: str, as_json: bool) -> None:
    facts = {
        "recipe": recipe.name,
        "plan": sampler.plan.describe(),
        "guidance_scale": recipe.guidance,
        "images": count,
        "features": features,
        "frechet_distance": measured,
        "published_fid": recipe.fid,
        "published_images": recipe.images,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{recipe.dataset}: {sampler.plan.describe()}")
    found = (
        f"Frechet distance of {features} {measured:.2f}" if measured is not None else "no distance without --statistics"
    )
    click.echo(f"{count} images, {found}; published: FID {recipe.fid:g} of {recipe.images} ({recipe.paper})")
    if measured is None:
        click.echo(f"the statistics are published as {recipe.statistics}")
