"""Recipes: the published evaluations, one JSON file per data set, one row per method, one number per NFE.

`cifar10-amed-5` is the row "amed" of cifar10.json at five evaluations. The files say where their numbers are from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from amed_engine.errors import ConfigError
from amed_engine.solvers.plan import Plan, make_plan
from amed_engine.zoo.catalogue import CATALOGUE

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One published number and all that it takes to measure it again.

    fid: as published, over `images` samples, with the statistics file of EDM's form named `statistics`. learned: None for a
    training-free method, else how the predictor is trained: scale_dir, scale_time, teacher, teacher_intermediate.
    afs: whether the first evaluation is analytic. latent: whether samples are latents, which the model's first stage turns
    into images. guidance: the scale of classifier-free guidance; nfe then counts solver steps, in each of which the network
    answers twice. prompts: the published file of captions, one for each image.
    """

    name: str
    dataset: str
    model: str
    statistics: str
    images: int
    nfe: int
    fid: float
    solver: str
    schedule: str
    paper: str
    rho: float | None
    afs: bool
    options: Mapping[str, Any]
    learned: Mapping[str, Any] | None
    latent: bool = False
    guidance: float | None = None
    prompts: str | None = None

    def plan(self) -> Plan:
        """What runs, on the noise levels 80 to 0.002 that models of continuous time are published for, or those of the
        model's own discrete time.
        """
        own = {"solver": self.solver, "options": self.options, "schedule": self.schedule, "rho": self.rho}
        rest = {"afs": self.afs, "midpoint": self.learned is not None, "guidance_scale": self.guidance}
        return make_plan(self.nfe, **own, **rest, **self._levels())

    def _levels(self) -> dict[str, Any]:
        betas = CATALOGUE[self.model].alphas_cumprod()
        if self.schedule != "discrete" or betas is None:
            return {}
        low, high = ((1 - betas[[0, -1]]) / betas[[0, -1]]).sqrt().tolist()
        return {"alphas_cumprod": betas, "sigma_min": low, "sigma_max": high}


def recipe_names() -> list[str]:
    """Every published number that there is a recipe for."""
    return list(_recipes())


def load_recipe(name: str) -> Recipe:
    """The recipe of this name, data set - row - NFE. Raises ConfigError with what there is."""
    if name in _recipes():
        return _recipes()[name]
    tables = "; ".join(f"{table}: {', '.join(data['rows'])}" for table, data in _tables().items())
    raise ConfigError(
        f"unknown recipe {name!r}; names are data set-row-NFE, e.g. cifar10-amed-5: {tables}; not every row has every NFE"
    )


@cache
def _recipes() -> dict[str, Recipe]:
    rows = [(f"{table}-{row}", data, data["rows"][row]) for table, data in _tables().items() for row in data["rows"]]
    made = [_recipe(f"{name}-{nfe}", data, row, int(nfe)) for name, data, row in rows for nfe in row["fid"]]
    return {recipe.name: recipe for recipe in made}


def _recipe(name: str, data: Mapping[str, Any], row: Mapping[str, Any], nfe: int) -> Recipe:
    """What its table and its row say, but for what depends on the NFE."""
    given = {"rho": None, "options": {}, "learned": None, **data, **row}
    said = {key: value for key, value in given.items() if key not in ("sources", "rows")}
    afs = nfe % 2 == 1 if row["afs"] == "odd" else row["afs"]
    return Recipe(**{**said, "name": name, "nfe": nfe, "fid": row["fid"][str(nfe)], "afs": afs})


@cache
def _tables() -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(FOLDER.glob("*.json"))}
