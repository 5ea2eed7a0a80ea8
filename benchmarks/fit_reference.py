"""Fit predictors to the reference network and measure them, on its recorded latents and on fresh ones.

    python benchmarks/fit_reference.py --nfe 5 --seed 0 --samples 512 --late 3

Each predictor lands in results/reference_digits/, its measurements in fit-reference.json beside it: RMSE to the fine
solution (Heun, 41 noise levels), median over images of the RMSE, and Frechet distance of raw pixels to it. A predictor that
is there already is measured again, not fitted. The network is not part of the project; without it the script says so.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from harness import environment
from quality import reference_digits

import amed_engine
from amed_engine.checkpoints import atomic_write
from amed_engine.metrics import Statistics, frechet_distance
from amed_engine.models import Model, tune
from amed_engine.seeds import parse_seeds

FOLDER = Path(__file__).parent / "results" / "reference_digits"
FRESH_SEED = 20_000


@torch.no_grad()
def fresh(model: Model, like: Tensor) -> tuple[Tensor, Tensor]:
    """Latents that nobody trained or chose on, and their fine solutions."""
    latents = torch.randn(like.shape, generator=torch.Generator().manual_seed(FRESH_SEED))
    fine = amed_engine.Sampler(model.network, solver="heun", nfe=80, schedule="polynomial", rho=7.0, afs=False)
    return latents, torch.cat([fine.run(part).images for part in latents.split(64)])


def measured(sampler: amed_engine.Sampler, latents: Tensor, reference: Tensor) -> dict[str, float]:
    images = torch.cat([sampler.run(part).images for part in latents.split(64)])
    error = (images - reference).double().square().flatten(1).mean(1)
    sides = (Statistics().update(pixels.flatten(1)) for pixels in (images, reference))
    return {"rmse": error.mean().sqrt().item(), "median": error.sqrt().median().item(), "fd": frechet_distance(*sides)}


@click.command()
@click.option("--nfe", default="5")
@click.option("--seed", default="0")
@click.option("--samples", default=512)
@click.option("--late", default=3)
@click.option("--variant", default="nonstationary")
@click.option("--compile/--no-compile", default=False, help="Compile the network first: for long fits on a CPU.")
def main(nfe: str, seed: str, samples: int, late: int, variant: str, compile: bool) -> None:
    model, latents, reference = reference_digits(512)
    sets = {"recorded": (latents, reference), "fresh": fresh(model, latents)}
    network = tune(model, compile="default" if compile else None, memory_format=None, autocast=None).network
    file = FOLDER / "fit-reference.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    for number in parse_seeds(nfe):
        for s in parse_seeds(seed):
            name = f"{variant}-nfe{number}-seed{s}"
            row, path = rows.get(name, {}), FOLDER / f"{name}.safetensors"
            if not path.exists():
                started = time.perf_counter()
                predictor = amed_engine.fit(network, variant=variant, nfe=number, seed=s, samples=samples, late=late)  # type: ignore[arg-type]
                amed_engine.save_predictor(predictor, path)
                row = {"fit_seconds": time.perf_counter() - started, "samples": samples, "late": late}
            sampler = amed_engine.Sampler(model.network, path)
            rows[name] = row | {part: measured(sampler, *both) for part, both in sets.items()}
            print(name, rows[name])
            atomic_write(file, json.dumps({**environment(), "rows": rows}, indent=2).encode())


if __name__ == "__main__":
    main()
