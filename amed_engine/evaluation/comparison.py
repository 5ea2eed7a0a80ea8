"""Every solver on the same seeds at the same number of evaluations, against a solution fine enough to be the truth.

The distance of a sample to what the exact solution of the ODE makes of the same latent,

    RMSE = sqrt(mean over samples and pixels of (x - x_reference)²),   pixels in [-1, 1]

judges the solver alone, whatever the model is worth.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import amed_engine.zoo as zoo
from amed_engine.engine.model import Model
from amed_engine.engine.pairing import NO_PREDICTOR
from amed_engine.engine.request import check_labels
from amed_engine.engine.resolve import resolve
from amed_engine.engine.result import SampleResult
from amed_engine.engine.sampler import Sampler
from amed_engine.engine.seeds import check_seeds
from amed_engine.errors import ConfigError
from amed_engine.evaluation.metrics.distances import Distances, per_image_rmse, rmse
from amed_engine.sampling.modes import leaving_modes
from amed_engine.solvers import SOLVERS, make_solver, solver_names
from amed_engine.solvers.base import count_evaluations, count_intervals
from amed_engine.solvers.mean import FirstStep

logger = logging.getLogger("amed_engine")

_FINE: dict[str, Any] = {"schedule": "polynomial", "rho": 7.0, "nfe": 80, "afs": False}
# Of the solvers here the one that comes nearest in 80 evaluations: an RMSE of 1e-4 on the bundled model, against 3e-3 of
# Heun's method on the same noise levels (both to Heun's with 640).
REFERENCE = {"solver": "deis", "solver_options": {"max_order": 4}, **_FINE}
# By name, for who wants another; Heun's is the one that published comparisons are to.
REFERENCES = {"deis-fine": REFERENCE, "heun-fine": {"solver": "heun", **_FINE}}
CURVE_NFES = range(3, 11)
MAX_COLUMNS = 32
# Name -> solver and options.
TRAINING_FREE: dict[str, tuple[str, dict[str, Any]]] = {
    f"{solver}{suffix}": (solver, dict(options))
    for solver in solver_names("none", "optional")
    for suffix, options in SOLVERS[solver].compared.items()
}


@dataclass(frozen=True)
class Setting:
    """What all solvers share. schedule, rho and afs do not bind a predictor, which keeps those it was trained for."""

    class_labels: int | float | Sequence | Tensor | None = None  # of all samples, or one a sample
    guidance_scale: float | None = None
    schedule: str | Tensor | None = None
    rho: float | None = None
    afs: FirstStep | None = None
    batch: int = 64
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32

    def sampler(self, model: Model, predictor: Any = None, **plan: Any) -> Sampler:
        # Eager: no solver here runs often enough for a captured graph to pay.
        return Sampler(model.network, predictor, device=self.device, dtype=self.dtype, backend="eager", **plan)

    def results(self, sampler: Sampler, seeds: list[int] | Tensor, bar: tqdm) -> Iterator[SampleResult]:
        """What these seeds, or latents, become, at most `batch` at a time."""
        labels = self.class_labels
        if labels is not None:
            labels = check_labels(labels, sampler.model, len(seeds), look=True)
        for start in range(0, len(seeds), self.batch):
            rows = slice(start, start + self.batch)
            part = sampler.run(seeds[rows], None if labels is None else labels[rows], self.guidance_scale)
            bar.update(len(part.images) * part.nfe)
            yield part

    def images(self, sampler: Sampler, seeds: list[int] | Tensor, bar: tqdm) -> Tensor:
        """All their images, on the CPU."""
        return torch.cat([part.images.cpu() for part in self.results(sampler, seeds, bar)])


@dataclass(frozen=True)
class Score:
    """One solver: its error over all samples, the median of the samples' own, and its images (seeds, C, H, W)."""

    name: str
    plan: str
    rmse: float
    median: float
    images: Tensor


@dataclass(frozen=True)
class Comparison:
    """rows: best first. curves: name -> NFE -> RMSE over the first curve_samples samples. reference: its rmse is 0."""

    model: str
    nfe: int
    seeds: list[int]
    samples: int
    curve_samples: int
    reference: Score
    rows: list[Score]
    curves: dict[str, dict[int, float]]

    def to_json(self) -> dict:
        """All of it but the images."""
        data = {name: getattr(self, name) for name in ("model", "nfe", "seeds", "samples", "curve_samples", "curves")}
        rows = [{"name": row.name, "plan": row.plan, "rmse": row.rmse, "median": row.median} for row in self.rows]
        return {**data, "reference": self.reference.plan, "rows": rows}

    def table(self) -> str:
        """The rows as text, best first."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{row.name:<{width}}  {row.rmse:7.4f}  {row.median:7.4f}  {row.plan}" for row in self.rows]
        return "\n".join([f"{'solver':<{width}}  {'RMSE':>7}  {'median':>7}  plan", *lines])


@leaving_modes
def compare(
    model: Any,
    nfe: int = 5,
    seeds: Sequence[int] = range(8),
    *,
    samples: int = 128,
    curve_samples: int = 16,
    predictor: str | None = None,
    weights: str | os.PathLike | None = None,
    setting: Setting | None = None,
    progress: bool = False,
) -> Comparison:
    """Run every solver at this NFE, and at 3 to 10 for the curves, on the same latents and labels.

    model, weights: as `Sampler` takes them. seeds: of the images to show. samples: how many the RMSE is over, those seeds and
    the smallest other numbers. curve_samples: the same for the curves, 0 for none. predictor: a path, "none", or None for
    the model's bundled ones. progress: a bar on stderr. Raises ConfigError and what `Sampler` raises.
    """
    setting, seeds = setting or Setting(), check_seeds(list(seeds))
    _check(seeds, samples, curve_samples, setting.batch)
    resolved = resolve(model, weights=weights)
    if isinstance(setting.schedule, Tensor):
        curve_samples = 0  # the levels are those of one NFE
    everyone = _extended(seeds, max(samples, curve_samples))
    reference = setting.sampler(resolved, **REFERENCE)
    nfes = {nfe, *CURVE_NFES} if curve_samples else {nfe}
    drawn = dict.fromkeys(nfes, everyone[:curve_samples]) | {nfe: everyone}
    runs = list(_samplers(resolved, sorted(nfes), nfe, predictor, setting))
    total = len(everyone) * reference.nfe + sum(len(drawn[sampler.nfe]) * sampler.nfe for _, sampler in runs)
    rows, curves = [], {}
    with tqdm(total=total, desc="compare", unit="eval", unit_scale=True, disable=not progress) as bar:
        truth = setting.images(reference, everyone, bar)
        for name, sampler in runs:
            images = setting.images(sampler, drawn[sampler.nfe], bar)
            if sampler.nfe == nfe:
                errors = Distances.of(per_image_rmse(images, truth[: len(images)]))
                shown = images[: len(seeds)].clone()
                rows.append(Score(name, sampler.plan.describe(), errors.rmse, errors.median, shown))
            if curve_samples:
                curves.setdefault(name, {})[sampler.nfe] = rmse(images[:curve_samples], truth[:curve_samples])
    return Comparison(
        model=model if isinstance(model, str) else type(model).__name__,
        nfe=nfe,
        seeds=seeds,
        samples=len(everyone),
        curve_samples=curve_samples,
        reference=Score("reference", reference.plan.describe(), 0.0, 0.0, truth[: len(seeds)]),
        rows=sorted(rows, key=lambda row: row.rmse),
        curves=curves,
    )


def _check(seeds: list[int], samples: int, curve_samples: int, batch: int) -> None:
    if len(seeds) > MAX_COLUMNS:
        raise ConfigError(f"seeds are columns of a picture, at most {MAX_COLUMNS}, got {len(seeds)}; see samples")
    if samples < 1 or curve_samples < 0 or batch < 1:
        raise ConfigError(
            f"samples and batch must be at least 1, curve_samples 0, got {samples}, {batch}, {curve_samples}"
        )


def _extended(seeds: list[int], count: int) -> list[int]:
    """The seeds, completed to `count` by the smallest numbers that are not among them."""
    given = set(seeds)
    others = (seed for seed in itertools.count() if seed not in given)
    return [*seeds, *itertools.islice(others, max(0, count - len(seeds)))]


def _samplers(
    model: Model, nfes: list[int], nfe: int, predictor: str | None, setting: Setting
) -> Iterator[tuple[str, Sampler]]:
    """Every solver at every NFE it can spend; the predictor given only at `nfe`."""
    if predictor is None and model.name:
        bundled = [zoo.bundled_predictor(model.name, n) for n in nfes]
        learned = [p for p in bundled if p and p.plan and p.plan.guidance_scale == setting.guidance_scale]
        samplers = [setting.sampler(model, p) for p in learned]
    else:
        samplers = [] if predictor in (None, NO_PREDICTOR) else [setting.sampler(model, predictor, nfe=nfe)]
    yield from ((learned_name(sampler), sampler) for sampler in samplers)
    grid = {"schedule": setting.schedule, "rho": setting.rho}
    # With an analytic first step where it takes one, every solver can spend any number from 2 on.
    takes = {name: free for name, free in TRAINING_FREE.items() if _spends(setting.schedule, *free, nfe)}
    if not takes and isinstance(setting.schedule, Tensor):
        raise ConfigError(f"no solver spends {nfe} evaluations on these {len(setting.schedule)} noise levels")
    for (name, (solver, options)), n in itertools.product(takes.items(), nfes):
        per_interval = make_solver(solver, **options).evaluations(False)
        if setting.afs is not None and not count_intervals(per_interval, n, afs=setting.afs):
            logger.info("%s cannot spend %d evaluations with afs=%s: left out", name, n, setting.afs)
            continue
        afs = setting.afs
        if afs is None and not isinstance(setting.schedule, Tensor):
            afs = not count_intervals(per_interval, n, afs=False)
        yield name, setting.sampler(model, solver=solver, solver_options=options, nfe=n, afs=afs, **grid)


def _spends(schedule: str | Tensor | None, solver: str, options: dict[str, Any], nfe: int) -> bool:
    """Whether a solver may run at this NFE: on any schedule by name, on noise levels where they cost that much."""
    if not isinstance(schedule, Tensor):
        return True
    cost = count_evaluations(make_solver(solver, **options), len(schedule) - 1, midpoint=False)
    return nfe in (cost, cost - 1)  # - 1: with an analytic first step


def learned_name(sampler: Sampler) -> str:
    """What a sampler with a predictor is called in tables: "amed", or "ipndm-2 + amed" for a plugin."""
    plan = sampler.plan
    order = "".join(f"-{value}" for name, value in plan.options if name == "max_order")
    return plan.solver if plan.solver in ("amed", "nonstationary") else f"{plan.solver}{order} + amed"
