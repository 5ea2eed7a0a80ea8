"""What real_networks.py measures: solvers, schedules and first steps on one network, from the same latents as the truth.

A first step is `plain`, an evaluation of the network; `zero`, the analytic one of data about a mean image of zero; or `mean`,
the same about the network's mean answer

    m = E[D(sigma_0 z; sigma_0)],   D(x; sigma_0) ≈ m + (x - m) (1 - sigma_0 / sqrt(1 + sigma_0²))
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import flow_digits
import galaxygrad
import torch
from torch import Tensor

import amed_engine
from amed_engine.engine.measure import measure_mean
from amed_engine.engine.resolve import resolve
from amed_engine.engine.seeds import draw
from amed_engine.errors import ConfigError
from amed_engine.evaluation.comparison import REFERENCE, TRAINING_FREE
from amed_engine.evaluation.metrics import per_image_rmse
from amed_engine.sampling.denoiser import as_denoised, bind_labels, mean_of_labels
from amed_engine.sampling.loop import sample
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.plan import Plan, make_plan, own_range

FOLDER = galaxygrad.FOLDER  # the fine solutions too, kept from one run to the next
GUIDED = {"digits-g1.5": 1.5, "digits-g3": 3.0}  # the bundled network at these guidance scales
NETWORKS = (*galaxygrad.NETWORKS, "digits", *GUIDED, flow_digits.NAME)
SCHEDULES = ("polynomial", "logsnr", "time_uniform")
FIRSTS: dict[str, FirstStep] = {"plain": False, "zero": True, "mean": "mean"}
SOLVERS = TRAINING_FREE | {f"deis-{order}": ("deis", {"max_order": order}) for order in (2, 4)}
BATCH = 16  # what stays in the cache of one core
FINER = {**REFERENCE, "nfe": 320}  # tells the error of the reference
FINER_LATENTS = 32
FIRST_SEED = 64  # `calibrate` chooses on those before
JUDGED = 12  # rows of a calibration
FIT_SEED = 20_000  # its latents are none of the seeds measured on

Estimate = Callable[[Tensor, Tensor], Tensor]  # (x, sigma (B,)) -> D
Found = tuple[float, float]  # RMSE over all latents and pixels, median over latents of each one's RMSE


@dataclass(frozen=True)
class Yard:
    """A network and its latents: unit noise (B, C, H, W) of the seeds FIRST_SEED, ..., with class vectors (B, K) where it has
    any."""

    network: Callable[..., Any]
    latents: Tensor
    labels: Tensor | None
    range: tuple[float, float]
    guidance: float | None = None

    def plan(self, **wish: Any) -> Plan:
        wish = {{"solver_options": "options"}.get(name, name): value for name, value in wish.items()}
        return make_plan(**wish, sigma_min=self.range[0], sigma_max=self.range[1])

    def part(self, start: int) -> Part:
        rows = slice(start, start + BATCH)
        labels = None if self.labels is None else self.labels[rows]
        bound = bind_labels(self.network, labels, self.guidance)
        return Part(lambda x, sigma: as_denoised(bound(x, sigma)).x0, self.latents[rows], labels, self.guidance)

    def solutions(self, plan: Plan, count: int | None = None) -> Tensor:
        """What the first `count` latents, all of them for None, become without an analytic step."""
        starts = range(0, count or len(self.latents), BATCH)
        return torch.cat([solve(plan, self.part(start)) for start in starts])[:count]


class Part(NamedTuple):
    """At most BATCH latents, their class vectors and guidance, and the network bound to these."""

    denoise: Estimate
    latents: Tensor
    labels: Tensor | None
    guidance: float | None = None


@lru_cache(maxsize=1)
def yard(name: str, samples: int) -> Yard:
    """One of NETWORKS with its first latents. Raises what `galaxygrad.load` and `flow_digits.load` do."""
    model = resolve(_opened(name))
    latents, classes = draw(range(FIRST_SEED, FIRST_SEED + samples), model.shape or (), model.label_dim)
    labels = None if classes is None else torch.nn.functional.one_hot(classes, model.label_dim).float()
    return Yard(model.network, latents, labels, own_range(model.sigma_min, model.sigma_max), GUIDED.get(name))


def _opened(name: str) -> Any:
    if name in galaxygrad.NETWORKS:
        return galaxygrad.load(galaxygrad.download(FOLDER), name)
    return flow_digits.load(FOLDER) if name == flow_digits.NAME else "digits"


def prepare(names: Collection[str]) -> None:
    """What these networks need, once and before any of them is measured: the wheel downloaded, the flow trained."""
    if set(names) & set(galaxygrad.NETWORKS):
        galaxygrad.download(FOLDER)
    if flow_digits.NAME in names:
        flow_digits.load(FOLDER)


def default_samples(name: str) -> int:
    return 256 if galaxygrad.NETWORKS.get(name, ("", 8))[1] <= 32 else 96


def solve(plan: Plan, part: Part, means: Tensor | None = None) -> Tensor:
    """What a plan makes of latents; means: rows of a `Mean`, for a plan that starts about it."""
    about = None if means is None or plan.afs != "mean" else mean_of_labels(means, part.labels, part.guidance)
    start = plan.sigmas[0] * part.latents
    return sample(part.denoise, start, plan.levels, plan.make_solver(), afs=plan.afs, mean=about)


class Remembering:
    """A denoiser that evaluates no point twice: solvers on equal noise levels begin alike, to the bit."""

    def __init__(self, denoiser: Estimate):
        self.denoiser = denoiser
        self.known: dict[tuple[float, bytes], Tensor] = {}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        key = sigma[0].item(), hashlib.sha256(x.contiguous().numpy().data).digest()
        if key not in self.known:
            self.known[key] = self.denoiser(x, sigma)
        return self.known[key]


@torch.no_grad()
def truth(name: str, samples: int) -> tuple[Tensor, Tensor]:
    """The fine solutions (B, C, H, W) and the rows (R, C, H, W) of the mean answer, from the folder where they are there."""
    file = FOLDER / f"{name}-{FIRST_SEED}-{samples}.pt"
    if not file.is_file():
        of = yard(name, samples)
        torch.save({"truth": of.solutions(of.plan(**REFERENCE)), "means": measure_mean(of.network).rows()}, file)
    data = torch.load(file, weights_only=True)
    return data["truth"], data["means"]


@torch.no_grad()
def facts(name: str, samples: int) -> dict[str, Any]:
    """What is known of a network before any solver is: its size, its mean answer, its samples, and how exact the truth is."""
    solutions, means = truth(name, samples)
    of = yard(name, samples)
    finer = of.plan(**FINER)
    error = summary(per_image_rmse(solutions[:FINER_LATENTS], of.solutions(finer, FINER_LATENTS)))
    found = {"shape": list(means.shape[1:]), "samples": samples, "sigma_min": of.range[0], "sigma_max": of.range[1]}
    found |= {"mean_answer": means.mean().item(), "mean_answer_rms": means.square().mean().sqrt().item()}
    found |= {
        "mean": solutions.mean().item(),
        "std": solutions.std().item(),
        "reference": of.plan(**REFERENCE).describe(),
    }
    found |= {"reference_error": error, "reference_error_of": f"{FINER_LATENTS} latents, to {finer.describe()}"}
    rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in found.items()}
    return rounded | _own_facts(name, of)


def _own_facts(name: str, of: Yard) -> dict[str, Any]:
    """What only some have: a guidance scale, a training of their own."""
    guided = {} if of.guidance is None else {"guidance_scale": of.guidance}
    return guided | ({"training": flow_digits.training(FOLDER)} if name == flow_digits.NAME else {})


@torch.no_grad()
def measure(name: str, samples: int, nfe: int, schedule: str) -> dict[str, dict[str, Found]]:
    """First step -> solver -> its errors, of every solver that can spend `nfe` evaluations on this schedule."""
    of, (solutions, means) = yard(name, samples), truth(name, samples)
    plans = {(first, solver): _plan(of, solver, nfe, schedule, first) for first in FIRSTS for solver in SOLVERS}
    errors: dict[tuple[str, str], list[Tensor]] = {key: [] for key, plan in plans.items() if plan}
    for start in range(0, samples, BATCH):
        part = of.part(start)
        part = part._replace(denoise=Remembering(part.denoise))
        for first, solver in errors:
            made = solve(plans[first, solver], part, means)  # type: ignore[arg-type]
            errors[first, solver].append(per_image_rmse(made, solutions[start : start + BATCH]))
    found: dict[str, dict[str, Found]] = {first: {} for first in FIRSTS}
    for (first, solver), parts in errors.items():
        found[first][solver] = summary(torch.cat(parts))
    return found


def _plan(of: Yard, solver: str, nfe: int, schedule: str, first: str) -> Plan | None:
    name, options = SOLVERS[solver]
    try:
        return of.plan(solver=name, options=options, nfe=nfe, schedule=schedule, afs=FIRSTS[first])
    except ConfigError as error:
        if "not a whole number of intervals" not in str(error):
            raise
        return None


def fitted(name: str, samples: int, nfe: int, latents: int) -> dict[str, Any]:
    """A non-stationary predictor, fitted on latents of its own: its errors, and what it took."""
    of, (solutions, _) = yard(name, samples), truth(name, samples)
    started = time.perf_counter()
    predictor: Any = amed_engine.fit(
        of.network, nfe=nfe, samples=latents, seed=FIT_SEED, starts=1, guidance_scale=of.guidance
    )
    seconds = time.perf_counter() - started
    sampler = amed_engine.Sampler(of.network, predictor, backend="eager")
    classes = None if of.labels is None else of.labels.argmax(1)
    parts = [slice(start, start + BATCH) for start in range(0, samples, BATCH)]
    given = [(of.latents[part], None if classes is None else classes[part]) for part in parts]
    made = [sampler.run(*each, guidance_scale=of.guidance) for each in given]
    error = summary(per_image_rmse(torch.cat([each.images for each in made]), solutions))
    return {"error": error, "latents": latents, "seconds": round(seconds)}


@torch.no_grad()
def calibrated(name: str, samples: int, nfe: int) -> dict[str, Any]:
    """What `calibrate` chooses, beside the best of its first rows on these latents, of which it has seen none."""
    of, (solutions, means) = yard(name, samples), truth(name, samples)
    started = time.perf_counter()
    found: Any = amed_engine.calibrate(of.network, nfe, guidance_scale=of.guidance, progress=False)
    seconds = time.perf_counter() - started
    errors: list[list[Tensor]] = [[] for _ in found.rows[:JUDGED]]
    for start in range(0, samples, BATCH):
        part = of.part(start)
        part = part._replace(denoise=Remembering(part.denoise))
        for row, parts in zip(found.rows, errors, strict=False):
            parts.append(per_image_rmse(solve(row.plan, part, means), solutions[start : start + BATCH]))
    every = [summary(torch.cat(parts)) for parts in errors]
    best = min(range(len(every)), key=lambda k: every[k][0])
    chosen = {"plan": found.plan.describe(), "error": every[0], "evaluations": found.evaluations}
    return {**chosen, "seconds": round(seconds), "best": every[best], "best_plan": found.rows[best].plan.describe()}


def summary(errors: Tensor) -> Found:
    """From each latent's RMSE (B,)."""
    values = errors.square().mean().sqrt().item(), errors.median().item()
    return tuple(float(f"{value:.5g}") for value in values)  # type: ignore[return-value]
