"""A published evaluation again: recipe -> Sampler -> a stream of images -> whatever measures them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import amed_engine.adapters as adapters
import amed_engine.zoo as zoo
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import load_predictor
from amed_engine.engine.identity import hashed
from amed_engine.engine.images import rounded
from amed_engine.engine.origin import Origin
from amed_engine.engine.sampler import Sampler
from amed_engine.errors import ConfigError
from amed_engine.evaluation.published.recipes import Recipe
from amed_engine.evaluation.published.text_to_image import TextToImage, read_prompts
from amed_engine.sampling.predictors import Predictor
from amed_engine.zoo.weights import VARIABLE


def recipe_sampler(
    recipe: Recipe,
    *,
    weights: str | os.PathLike | None = None,
    predictor: Predictor | str | os.PathLike | None = None,
    model: Any = None,
    **options: Any,
) -> Sampler:
    """The sampler of a recipe.

    weights: of the model, as `zoo.load` takes them. model: the denoiser itself, where it is there already (a text-to-image
    recipe's has the prompts bound). predictor: of a learned method; None looks for predictors/<recipe>.safetensors in the
    folder of the weights. options: the Sampler's device, backend, compile, autocast ...
    Raises ConfigError where something is missing, saying how to get it, or where the predictor is for something else.
    """
    if recipe.learned is None and predictor is not None:
        raise ConfigError(f"{recipe.name} is training-free; leave the predictor out")
    model = zoo.load(recipe.model, weights) if model is None else model
    if recipe.learned is None:
        return Sampler(model, **_arguments(recipe), **options)
    given = _find_predictor(recipe, weights) if predictor is None else predictor
    predictor = given if isinstance(given, Predictor) else load_predictor(given)
    plan, made = recipe.plan(), predictor.plan
    if made is None:
        return Sampler(model, predictor, **_arguments(recipe), **options)
    if (made.solver, made.nfe) != (plan.solver, plan.nfe):
        raise ConfigError(f"{recipe.name} needs a predictor for {plan.describe()}; this one is for {made.describe()}")
    return Sampler(model, predictor, **options)


def _arguments(recipe: Recipe) -> dict[str, Any]:
    common = {"solver": recipe.solver, "afs": recipe.afs, "solver_options": dict(recipe.options)}
    if recipe.schedule == "discrete":  # which is the model's own: its noise levels are known here, not to the sampler
        return {**common, "schedule": recipe.plan().levels}
    return {**common, "nfe": recipe.nfe, "schedule": recipe.schedule, "rho": recipe.rho}


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


def prepare(
    recipe: Recipe,
    *,
    weights: str | os.PathLike | None = None,
    predictor: Predictor | str | os.PathLike | None = None,
    prompts: str | os.PathLike | None = None,
    batch: int = 64,
    **options: Any,
) -> Drawing:
    """All that a recipe needs to draw images; see `recipe_sampler`. prompts: the file of a text-to-image recipe, as published
    or a line each. batch: samples at once. Raises ConfigError, FileFormatError.
    """
    if (prompts is None) != (recipe.prompts is None):
        need = f"needs prompts: pass the file published as {recipe.prompts}" if prompts is None else "takes no prompts"
        raise ConfigError(f"{recipe.name} {need}")
    if prompts is None:
        sampler = recipe_sampler(recipe, weights=weights, predictor=predictor, **options)
        return Drawing(sampler, zoo.load_decoder(recipe.model, weights) if recipe.latent else None)
    texts, parts = read_prompts(prompts), TextToImage(recipe.model, batch, weights)
    sampler = recipe_sampler(recipe, weights=weights, predictor=predictor, model=parts.denoiser, **options)
    return Drawing(sampler, parts.decoder, parts, texts, recipe.guidance)


class Drawing(NamedTuple):
    """A sampler, and how its samples become images: decoder, of latents; parts and texts, of prompts."""

    sampler: Sampler
    decoder: Any = None
    parts: TextToImage | None = None
    texts: Sequence[str] = ()
    guidance: float | None = None

    def images(self, seeds: Sequence[int]) -> Tensor:
        """(B, C, H, W) in about -1 .. 1. Seed k has prompt k."""
        labels = None
        if self.parts is not None:
            self.parts.bind([self.texts[seed] for seed in seeds])
            labels = list(range(len(seeds)))
        samples = self.sampler.run(seeds, labels, guidance_scale=self.guidance).images
        if self.decoder is None:
            return samples
        return adapters.decode_latents(self.decoder.to(samples.device), samples)


def origin_of(recipe: Recipe, drawing: Drawing, seeds: Sequence[int]) -> Origin:
    """What decides the images of these seeds, for their files."""
    told = {"recipe": recipe.name}
    if drawing.parts is not None:
        told["prompts"] = hashed([drawing.parts.fingerprint, *drawing.texts])
    if drawing.decoder is not None:
        told["decoder"] = fingerprint(drawing.decoder) or "without weights that can be read"
    return Origin.of(drawing.sampler, seeds, guidance_scale=drawing.guidance, **told)


def draw(source: Sampler | Drawing, seeds: Sequence[int], batch: int = 64) -> Iterator[Tensor]:
    """The images of these seeds as bytes (B, C, H, W) on the CPU, batch by batch: clip(127.5 x + 128, 0, 255).

    Classes of a conditional model are drawn from the seeds. Nothing is kept: 50,000 images pass through a batch's memory.
    Raises ConfigError where there are fewer prompts than the seeds need.
    """
    drawing = Drawing(source) if isinstance(source, Sampler) else source
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, got {batch}")
    if drawing.parts is not None and seeds and max(seeds) >= len(drawing.texts):
        raise ConfigError(f"{max(seeds) + 1} images need as many prompts, there are {len(drawing.texts)}")
    for start in range(0, len(seeds), batch):
        yield rounded(drawing.images(seeds[start : start + batch])).cpu()
