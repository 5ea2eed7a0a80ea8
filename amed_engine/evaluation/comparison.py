"""Every solver on the same seeds at the same number of evaluations, against a solution fine enough to be the truth.

The distance of a sample to what the exact solution of the ODE makes of the same latent,

    RMSE = sqrt(mean over samples and pixels of (x - x_reference)²),   pixels in [-1, 1]

judges the solver alone, whatever the model is worth. Solver and solution go from the same noise level to the same: where a
predictor was trained for another range than the rest, it is measured against a solution of its own.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from amed_engine.engine.model import Model
from amed_engine.engine.pairing import NO_PREDICTOR, open_predictor
from amed_engine.engine.request import check_labels
from amed_engine.engine.resolve import resolve
from amed_engine.engine.result import SampleResult
from amed_engine.engine.sampler import Sampler
from amed_engine.engine.seeds import check_seeds
from amed_engine.errors import ConfigError
from amed_engine.evaluation.metrics.distances import Distances, per_image_rmse, rmse
from amed_engine.sampling.modes import leaving_modes
from amed_engine.solvers import SOLVERS, integrator_names, make_solver
from amed_engine.solvers.base import count_evaluations, count_intervals
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.plan import Plan

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
    for solver in integrator_names("none", "optional")
    for suffix, options in SOLVERS[solver].compared.items()
}


@dataclass(frozen=True)
class Setting:
    """What all solvers share. schedule, rho, afs, sigma_min and sigma_max do not bind a predictor, which keeps those it was
    trained for."""

    class_labels: int | float | Sequence | Tensor | None = None  # of all samples, or one a sample
    guidance_scale: float | None = None
    schedule: str | Tensor | None = None
    rho: float | None = None
    afs: FirstStep | None = None
    batch: int = 64
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    sigma_min: float | None = None
    sigma_max: float | None = None
    verify: bool = True

    @property
    def noise(self) -> dict[str, float | None]:
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}

    def sampler(self, model: Model, predictor: Any = None, **plan: Any) -> Sampler:
        # Eager: no solver here runs often enough for a captured graph to pay.
        own = {"device": self.device, "dtype": self.dtype, "verify": self.verify}
        return Sampler(model.network, predictor, backend="eager", **own, **plan)

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


class Range(NamedTuple):
    """Noise levels that a solver goes from and to."""

    high: float
    low: float

    @classmethod
    def of(cls, plan: Plan) -> Range:
        """To six digits, beyond which schedules round."""
        return cls(*(float(f"{sigma:.6g}") for sigma in (plan.sigmas[0], plan.sigmas[-1])))

    def __str__(self) -> str:
        return f"sigma {self.high:g} to {self.low:g}"


@dataclass(frozen=True)
class Score:
    """One solver: its error over all samples, the median of the samples' own, its images (seeds, C, H, W), and the noise
    levels that it goes from and to."""

    name: str
    plan: str
    rmse: float
    median: float
    images: Tensor
    range: Range

    @classmethod
    def of(cls, name: str, plan: Plan, images: Tensor, truth: Tensor, shown: int) -> Score:
        """shown: how many of the images are kept."""
        errors = Distances.of(per_image_rmse(images, truth[: len(images)]))
        return cls(name, plan.describe(), errors.rmse, errors.median, images[:shown].clone(), Range.of(plan))


@dataclass(frozen=True)
class Comparison:
    """rows: best first. curves: name -> NFE -> RMSE over the first curve_samples samples. reference: its rmse is 0, its range
    that of the training-free solvers."""

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
        ranges = {row.name: {"sigma_max": row.range.high, "sigma_min": row.range.low} for row in self.rows}
        return {**data, "reference": self.reference.plan, "rows": rows, "ranges": ranges}

    def table(self) -> str:
        """The rows as text, best first."""
        width = max(len(row.name) for row in self.rows)
        head = f"{'solver':<{width}}  {'RMSE':>7}  {'median':>7}  plan"
        told = [f"{row.rmse:7.4f}  {row.median:7.4f}  {row.plan}, {row.range}" for row in self.rows]
        lines = [f"{row.name:<{width}}  {text}" for row, text in zip(self.rows, told, strict=True)]
        return "\n".join([head, *lines, *([_OTHERS] if len({row.range for row in self.rows}) > 1 else [])])


_OTHERS = "Ranges differ: each row is measured against the solution of its own, and a shorter one is the easier task."


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
    the model's bundled ones; one that is given brings its range of noise levels to all solvers, unless the setting says
    another. progress: a bar on stderr. Raises ConfigError and what `Sampler` raises.
    """
    setting, seeds = setting or Setting(), check_seeds(list(seeds))
    _check(seeds, samples, curve_samples, setting.batch)
    resolved = resolve(model, weights=weights)
    if isinstance(setting.schedule, Tensor):
        _check_no_range(setting)
        curve_samples = 0  # the levels are those of one NFE
    everyone = _extended(seeds, max(samples, curve_samples))
    nfes = sorted({nfe, *CURVE_NFES} if curve_samples else {nfe})
    drawn = dict.fromkeys(nfes, everyone[:curve_samples]) | {nfe: everyone}
    learned = _learned(resolved, nfes, nfe, predictor, setting)
    if predictor not in (None, NO_PREDICTOR):
        setting = _on_its_range(setting, learned[0][1].plan)
    runs = [*learned, *_training_free(resolved, nfes, nfe, setting)]
    fine = _references(resolved, [sampler.plan for _, sampler in runs], setting)
    total = len(everyone) * sum(reference.nfe for reference in fine.values())
    total += sum(len(drawn[sampler.nfe]) * sampler.nfe for _, sampler in runs)
    rows, curves = [], {}
    with tqdm(total=total, desc="compare", unit="eval", unit_scale=True, disable=not progress) as bar:
        truths = {span: setting.images(reference, everyone, bar) for span, reference in fine.items()}
        for name, sampler in runs:
            images, truth = setting.images(sampler, drawn[sampler.nfe], bar), truths[Range.of(sampler.plan)]
            if sampler.nfe == nfe:
                rows.append(Score.of(name, sampler.plan, images, truth, len(seeds)))
            if curve_samples:
                curves.setdefault(name, {})[sampler.nfe] = rmse(images[:curve_samples], truth[:curve_samples])
    span = rows[-1].range  # of the training-free solvers
    told = model if isinstance(model, str) else type(model).__name__
    exact = Score.of("reference", fine[span].plan, truths[span], truths[span], len(seeds))
    rows.sort(key=lambda row: row.rmse)
    return Comparison(told, nfe, seeds, len(everyone), curve_samples, exact, rows, curves)


def _on_its_range(setting: Setting, plan: Plan) -> Setting:
    """The setting with a predictor's range of noise levels, as far as it says nothing of its own."""
    if isinstance(setting.schedule, Tensor):  # which says all
        return setting
    own = {"sigma_min": plan.sigmas[-1], "sigma_max": plan.sigmas[0]}
    return replace(setting, **{name: own[name] if asked is None else asked for name, asked in setting.noise.items()})


def _references(model: Model, plans: list[Plan], setting: Setting) -> dict[Range, Sampler]:
    """A fine solver for every range of noise levels."""
    ends = {Range.of(plan): {"sigma_max": plan.sigmas[0], "sigma_min": plan.sigmas[-1]} for plan in plans}
    return {span: setting.sampler(model, **noise, **REFERENCE) for span, noise in ends.items()}


def _check(seeds: list[int], samples: int, curve_samples: int, batch: int) -> None:
    if len(seeds) > MAX_COLUMNS:
        raise ConfigError(f"seeds are columns of a picture, at most {MAX_COLUMNS}, got {len(seeds)}; see samples")
    if samples < 1 or curve_samples < 0 or batch < 1:
        raise ConfigError(
            f"samples and batch must be at least 1, curve_samples 0, got {samples}, {batch}, {curve_samples}"
        )


def _check_no_range(setting: Setting) -> None:
    if given := [f"{name}={sigma:g}" for name, sigma in setting.noise.items() if sigma is not None]:
        raise ConfigError(
            f"noise levels in schedule say their own range, got {' and '.join(given)} as well; leave it out"
        )


def _extended(seeds: list[int], count: int) -> list[int]:
    """The seeds, completed to `count` by the smallest numbers that are not among them."""
    given = set(seeds)
    others = (seed for seed in itertools.count() if seed not in given)
    return [*seeds, *itertools.islice(others, max(0, count - len(seeds)))]


def _learned(
    model: Model, nfes: list[int], nfe: int, predictor: str | None, setting: Setting
) -> list[tuple[str, Sampler]]:
    """The bundled predictors of all these NFE, or the one given, at `nfe`."""
    if predictor is None:
        bundled = [model.predictors.get(n) for n in nfes]
        learned = [p for p in bundled if p and p.plan and p.plan.guidance_scale == setting.guidance_scale]
        samplers = [setting.sampler(model, p) for p in learned]
    else:
        given = [] if predictor == NO_PREDICTOR else [open_predictor(predictor)]
        samplers = [setting.sampler(model, p, nfe=nfe, **({} if p.plan else setting.noise)) for p in given]
    return [(learned_name(sampler), sampler) for sampler in samplers]


def _training_free(model: Model, nfes: list[int], nfe: int, setting: Setting) -> Iterator[tuple[str, Sampler]]:
    """Every solver at every NFE it can spend."""
    grid = {"schedule": setting.schedule, "rho": setting.rho, **setting.noise}
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
