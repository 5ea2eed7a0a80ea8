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
        return make_plan(
            self.nfe,
            solver=self.solver,
            options=self.options,
            schedule=self.schedule,
            rho=self.rho,
            afs=self.afs,
            midpoint=self.learned is not None,
            guidance_scale=self.guidance,
            **self._levels(),
        )

    def _levels(self) -> dict[str, Any]:
        betas = CATALOGUE[self.model].alphas_cumprod()
        if self.schedule != "discrete" or betas is None:
            return {}
        low, high = ((1 - betas[[0, -1]]) / betas[[0, -1]]).sqrt().tolist()
        return {"alphas_cumprod": betas, "sigma_min": low, "sigma_max": high}


def recipe_names() -> list[str]:
    """Every published number that there is a recipe for."""
    return [
        f"{table}-{row}-{nfe}"
        for table, data in _tables().items()
        for row in data["rows"]
        for nfe in data["rows"][row]["fid"]
    ]


def load_recipe(name: str) -> Recipe:
    """The recipe of this name, data set - row - NFE. Raises ConfigError with what there is."""
    head, _, nfe = name.rpartition("-")
    for table, data in _tables().items():
        row = data["rows"].get(head.removeprefix(f"{table}-")) if head.startswith(f"{table}-") else None
        if row is not None and nfe in row["fid"]:
            return _recipe(name, data, row, int(nfe))
    tables = {table: ", ".join(data["rows"]) for table, data in _tables().items()}
    raise ConfigError(
        f"unknown recipe {name!r}; names are data set-row-NFE, e.g. cifar10-amed-5: "
        f"{'; '.join(f'{table}: {rows}' for table, rows in tables.items())}; not every row has every NFE"
    )


def _recipe(name: str, data: Mapping[str, Any], row: Mapping[str, Any], nfe: int) -> Recipe:
    return Recipe(
        name=name,
        **{key: data[key] for key in ("dataset", "model", "statistics", "images")},
        nfe=nfe,
        fid=row["fid"][str(nfe)],
        **{key: row[key] for key in ("solver", "schedule", "paper")},
        rho=row.get("rho"),
        afs=nfe % 2 == 1 if row["afs"] == "odd" else row["afs"],
        options=row.get("options", {}),
        learned=row.get("learned"),
        **{key: data[key] for key in ("latent", "guidance", "prompts") if key in data},
    )


@cache
def _tables() -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(FOLDER.glob("*.json"))}
