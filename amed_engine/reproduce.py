"""A published evaluation again: recipe -> Sampler -> a stream of images -> whatever measures them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amed_engine import zoo
from amed_engine.checkpoints import Predictor, load_predictor
from amed_engine.errors import ConfigError
from amed_engine.sampler import Sampler
from amed_engine.zoo.recipes import Recipe
from amed_engine.zoo.weights import VARIABLE


def recipe_sampler(
    recipe: Recipe,
    *,
    weights: str | os.PathLike | None = None,
    predictor: Predictor | str | os.PathLike | None = None,
    **options: Any,
) -> Sampler:
    """The sampler of a recipe.

    weights: of the model, as `zoo.load` takes them. predictor: of a learned method; None looks for predictors/<recipe>
    .safetensors in the folder of the weights. options: the Sampler's device, backend, compile, autocast ...
    Raises ConfigError where something is missing, saying how to get it, or where the predictor is for something else.
    """
    if recipe.learned is None and predictor is not None:
        raise ConfigError(f"{recipe.name} is training-free; leave the predictor out")
    model = zoo.load(recipe.model, weights)
    plan = recipe.plan()
    if recipe.learned is None:
        return Sampler(model, **_arguments(recipe), **options)
    if predictor is None:
        predictor = _find_predictor(recipe, weights)
    if not isinstance(predictor, Predictor):
        predictor = load_predictor(predictor)
    if predictor.plan is None:
        return Sampler(model, predictor, **_arguments(recipe), **options)
    if (predictor.plan.solver, predictor.plan.nfe) != (plan.solver, plan.nfe):
        raise ConfigError(
            f"{recipe.name} needs a predictor for {plan.describe()}; this one is for {predictor.plan.describe()}"
        )
    return Sampler(model, predictor, **options)


def _arguments(recipe: Recipe) -> dict[str, Any]:
    names = ("solver", "nfe", "schedule", "rho", "afs")
    return {**{name: getattr(recipe, name) for name in names}, "solver_options": dict(recipe.options)}


def _find_predictor(recipe: Recipe, weights: str | os.PathLike | None) -> Path:
    folder = Path(weights if weights is not None else os.environ.get(VARIABLE, "."))
    file = (folder if folder.is_dir() else folder.parent) / "predictors" / f"{recipe.name}.safetensors"
    if file.exists():
        return file
    learned = dict(recipe.learned or {})
    options = "".join(f" --solver-option {name}={value}" for name, value in recipe.options.items())
    rho = "" if recipe.rho is None else f" --rho {recipe.rho:g}"
    raise ConfigError(
        f"{recipe.name} needs a predictor: {file} is not there. Pass one, convert a published one with `amed convert`, or "
        f"train it: amed distill --model {recipe.model} --nfe {recipe.nfe} --solver {recipe.solver}{options} "
        f"--schedule {recipe.schedule}{rho} --scale-dir {learned['scale_dir']:g} --scale-time {learned['scale_time']:g} "
        f"--teacher {learned['teacher']} --teacher-intermediate {learned['teacher_intermediate']} --out {file}"
    )


def draw(sampler: Sampler, seeds: Sequence[int], batch: int = 64) -> Iterator[Tensor]:
    """The images of these seeds as bytes (B, C, H, W) on the CPU, batch by batch: clip(127.5 x + 128, 0, 255).

    Classes of a conditional model are drawn from the seeds. Nothing is kept: 50,000 images pass through a batch's memory.
    """
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, got {batch}")
    for start in range(0, len(seeds), batch):
        images = sampler.run(seeds[start : start + batch]).images
        yield (images * 127.5 + 128).clip(0, 255).to(torch.uint8).cpu()
