"""Fit or distill predictors for the reference network and measure them, on its recorded latents and on fresh ones.

    python benchmarks/fit_reference.py --nfe 5 --seed 0 --samples 512 --late 3

    python benchmarks/fit_reference.py --variant constants --variant amed-solver   # rows of the ablation

Each predictor lands in results/reference_digits/, its measurements in fit-reference.json beside it: RMSE to the fine
solution (Heun, 41 noise levels), median over images of the RMSE, and Frechet distance of raw pixels to it; seconds, and
how often the network was evaluated, per latent. A predictor that is there already is measured again, not fitted.
The network is not part of the project; without it the script says so.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from harness import environment
from quality import reference_digits

import amed_engine
from amed_engine.checkpoints import atomic_write
from amed_engine.engine.model import Model, tune
from amed_engine.engine.seeds import parse_seeds
from amed_engine.evaluation.metrics import Statistics, frechet_distance

FOLDER = Path(__file__).parent / "results" / "reference_digits"
FRESH_SEED = 20_000
FITS: dict[str, dict[str, Any]] = {
    "nonstationary": {},
    "nonstationary-fixed-levels": {"learn_sigmas": False},
    "adaptive": {"variant": "adaptive"},
    "adaptive-few-codes": {"variant": "adaptive", "codes": 8, "ridge": 1.0},
    "constants": {"variant": "constants"},
    "constants-levels": {"variant": "constants", "learn_sigmas": True},
    "epd": {"variant": "epd"},
    "epd-levels": {"variant": "epd", "learn_sigmas": True},
}
DISTILLED: dict[str, dict[str, Any]] = {
    "amed-solver": {},
    "amed-solver-scale-time": {"scale_time": 0.2},
    "amed-plugin": {"preset": "amed-plugin"},
    "amed-solver-wide": {"scale_time": 0.7, "scales": "wide"},
    "amed-solver-end-to-end": {"scale_time": 0.7, "scales": "wide", "objective": "end_to_end"},
}


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


class Counting:
    """Evaluations of a network, per latent."""

    def __init__(self, network: nn.Module):
        self.calls = 0
        network.register_forward_pre_hook(lambda _, inputs: self.add(len(inputs[0])))

    def add(self, latents: int) -> None:
        self.calls += latents


def made(variant: str, network: Any, nfe: int, seed: int, samples: int, late: int) -> Any:
    if variant in DISTILLED:
        return amed_engine.distill(network, nfe=nfe, seed=seed, **DISTILLED[variant])
    return amed_engine.fit(network, nfe=nfe, seed=seed, samples=samples, late=late, **FITS[variant])


@click.command()
@click.option("--nfe", default="5", show_default=True, help="E.g. 5 or 3-10.")
@click.option("--seed", default="0", show_default=True, help="E.g. 0 or 0-2.")
@click.option("--samples", default=512, show_default=True, help="Latents to fit on; distill has its own.")
@click.option("--late", default=3, show_default=True, help="Iterations on all of them.")
@click.option("--variant", "variants", type=click.Choice([*FITS, *DISTILLED]), multiple=True, default=["nonstationary"])
@click.option("--compile/--no-compile", default=False, help="Compile the network first: for long fits on a CPU.")
def main(nfe: str, seed: str, samples: int, late: int, variants: tuple[str, ...], compile: bool) -> None:
    """Fit what is not there yet, and measure."""
    model, latents, reference = reference_digits(512)
    sets = {"recorded": (latents, reference), "fresh": fresh(model, latents)}
    network = tune(model, compile="default" if compile else None, memory_format=None, autocast=None).network
    counting = Counting(network)  # type: ignore[arg-type]
    file = FOLDER / "fit-reference.json"
    for variant, number, s in itertools.product(variants, parse_seeds(nfe), parse_seeds(seed)):
        name = f"{variant}-nfe{number}-seed{s}"
        rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
        row, path = rows.get(name, {}), FOLDER / f"{name}.safetensors"
        if not path.exists():
            started, before = time.perf_counter(), counting.calls
            amed_engine.save_predictor(made(variant, network, number, s, samples, late), path)
            seconds, calls = time.perf_counter() - started, counting.calls - before
            row = {"fit_seconds": seconds, "evaluations": calls}
            row |= {"samples": samples, "late": late} if variant in FITS else {}
        sampler = amed_engine.Sampler(model.network, path)
        rows[name] = row | {part: measured(sampler, *both) for part, both in sets.items()}
        print(name, rows[name], flush=True)
        atomic_write(file, json.dumps({**environment(), "rows": rows}, indent=2).encode())


if __name__ == "__main__":
    main()
