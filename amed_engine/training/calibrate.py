"""The best training-free plan for a model: all of them measured against a fine solution, by successive halving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from tqdm import tqdm

from amed_engine.engine.measure import EVALUATIONS as OF_MEAN
from amed_engine.engine.model import Model
from amed_engine.engine.resolve import resolve
from amed_engine.engine.seeds import draw
from amed_engine.errors import ConfigError
from amed_engine.sampling.modes import leaving_modes
from amed_engine.solvers.arguments import in_range
from amed_engine.solvers.mean import Mean
from amed_engine.solvers.plan import Plan, make_plan
from amed_engine.training.batches import Batches, BoundDenoiser, Conditions, known_shape, mean_answer, mean_where_told
from amed_engine.training.contenders import contenders, first_steps
from amed_engine.training.gauss_newton import Example
from amed_engine.training.halving import Entrant, halve, some_of
from amed_engine.training.held_out import solved
from amed_engine.training.presets import TEACHER, made_for, noise_range

LATENTS = 64  # seeds 0 to 63
EVALUATIONS = 10_000  # at most, for one NFE: of the fine solution, of its check, of the mean answer and of all plans
FINE = 32  # evaluations of the fine solution: an error of 2e-3 on the bundled model, where 10 leave 1e-2
CHECKED = 16  # latents on which half as many tell how far it may be off
MAX_NFE = FINE // 2


@dataclass(frozen=True)
class Rating:
    """One plan's distance to the fine solution, as known from `latents`: RMSE, and the median of the samples' own RMSE."""

    name: str
    plan: Plan
    rmse: float
    median: float
    latents: int

    def to_json(self) -> dict:
        errors = {"rmse": self.rmse, "median": self.median}
        known = {name: error if math.isfinite(error) else None for name, error in errors.items()}
        return {"name": self.name, "plan": self.plan.describe(), **known, "latents": self.latents}


@dataclass(frozen=True)
class Calibration:
    """plan: the best, for `Sampler(model, plan=...)` and `Plan.save`. rows: all, those that were kept longest first, then the
    best; the RMSE of those that went early are estimates, from few of the latents, the hardest ones among them.

    reference: the fine solution; reference_error: how far half its evaluations end from it, RMSE, above its own error.
    evaluations: of the network, a row each; a guided one counts as one, as in every NFE.
    """

    plan: Plan
    rows: list[Rating]
    reference: str
    reference_error: float
    evaluations: int

    def to_json(self) -> dict:
        """The best plan in full, the others in a line each; errors that are no number are None."""
        told = ("reference", "reference_error", "evaluations")
        rows = [row.to_json() for row in self.rows]
        return {"plan": self.plan.to_json(), **{name: getattr(self, name) for name in told}, "rows": rows}

    def table(self, rows: int | None = None) -> str:
        """The first rows as text, None: all, and what they are measured against. Raises ConfigError."""
        if rows is not None and (type(rows) is not int or rows < 1):
            raise ConfigError(f"rows must be a positive integer, or None for all, got {rows!r}")
        shown = self.rows[:rows]
        width = max(len(row.name) for row in shown)
        lines = [
            f"{row.name:<{width}}  {row.latents:7}  {row.rmse:7.4f}  {row.median:7.4f}  {row.plan.describe()}"
            for row in shown
        ]
        head = f"{'solver':<{width}}  {'latents':>7}  {'RMSE':>7}  {'median':>7}  plan"
        told = f"against {self.reference}, half its evaluations being {self.reference_error:.4f} away"
        count = f"{len(self.rows)} plans" if len(shown) == len(self.rows) else f"{len(shown)} of {len(self.rows)} plans"
        return "\n".join([head, *lines, f"{count}, {told}; {self.evaluations} evaluations spent"])


@leaving_modes
def calibrate(
    model: object,
    nfe: int | Sequence[int] = 5,
    *,
    conditions: Conditions = None,
    guidance_scale: float | None = None,
    batch: int = 64,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shape: tuple[int, ...] | None = None,
    label_dim: int | None = None,
    progress: bool = True,
) -> Calibration | dict[int, Calibration]:
    """Find the training-free plan that comes nearest to the exact solution of this model's ODE at `nfe` evaluations.

    Every solver, schedule and first step ("mean" measured) on the latents of seeds 0 to 63, against DEIS-4 with 32
    evaluations: all on a few latents, some of the hardest among them, the better half on twice as many, until some run on
    all. At most 10,000 evaluations for each NFE, the fine solution and the mean included.
    model, sigma_min, sigma_max, shape, label_dim: as `Sampler` takes them. nfe: up to 16; several share the fine solution and
    give a dict. conditions: None takes the labels that the seeds draw; else one entry per batch, as `fit` takes them, of
    `batch` latents, which divides 64; denoisers are not cut, so a few at most. batch: rows of one network call too.
    The global generators are untouched. Raises ConfigError.
    """
    resolved = resolve(model, shape=shape, label_dim=label_dim, sigma_min=sigma_min, sigma_max=sigma_max)
    asked = list(nfe) if isinstance(nfe, Sequence) else [nfe]
    numbers = [int(number) if isinstance(number, numpy.integer) else number for number in asked]
    if not numbers:
        raise ConfigError("nfe is empty; pass a number of evaluations, or several")
    for number in numbers:
        in_range("calibrate", "nfe", number, 1, MAX_NFE)
    fine = make_plan(FINE, afs=False, guidance_scale=guidance_scale, **noise_range(resolved), **TEACHER)
    drawn = _drawn(resolved, fine, batch, conditions)
    if not all(isinstance(denoiser, BoundDenoiser) for denoiser, _ in drawn):
        for number in numbers:
            _check_rows(resolved, number, batch)
    mean = mean_where_told(resolved, [denoiser for denoiser, _ in drawn], fine.sigmas[0])
    truth = _Truth.of(resolved, fine, drawn, mean, progress)
    found = {number: _calibrated(resolved, number, truth, mean, batch, progress) for number in numbers}
    return found if isinstance(nfe, Sequence) else found[numbers[0]]


@dataclass(frozen=True)
class _Truth:
    """Latents with their fine solution, how far off that may be, and what all of it cost."""

    plan: Plan
    examples: list[Example]
    error: float
    evaluations: int

    @classmethod
    def of(cls, model: Model, plan: Plan, drawn: list, mean: Mean | None, progress: bool) -> _Truth:
        examples = []
        with tqdm(total=LATENTS * FINE, desc="fine solution", unit="eval", disable=not progress) as bar:
            for denoiser, x in drawn:
                examples.append(solved(denoiser, x, plan, mean_answer(mean, denoiser)))
                bar.update(len(x) * FINE)
        some = some_of(examples[0], torch.arange(min(CHECKED, len(examples[0].x)), device="cpu"))
        coarse = make_plan(FINE // 2, afs=False, **noise_range(model), **TEACHER)
        error = (solved(some.denoiser, some.x, coarse, None).target - some.target).square().mean().sqrt().item()
        spent = LATENTS * FINE + len(some.x) * coarse.nfe + (0 if mean is None else OF_MEAN)
        return cls(plan, examples, error, spent)


def _drawn(model: Model, plan: Plan, batch: int, conditions: Conditions) -> list[tuple]:
    """(denoiser, x) of every batch: what `Sampler.run(range(64))` starts from, with its labels unless conditions are given."""
    in_range("calibrate", "batch", batch, 1, LATENTS)
    if LATENTS % batch:
        raise ConfigError(f"batch must divide the {LATENTS} latents, got {batch}")
    noise, labels = draw(range(LATENTS), known_shape(model), model.classes)
    entries = conditions if conditions is not None or labels is None else labels.split(batch)
    data = Batches(model, plan, batch, torch.Generator(), entries)
    starts = (noise.to(model.device) * plan.sigmas[0]).split(batch)
    return [(data.bind([slice(0, batch)])[0], x) for x in starts]


def _check_rows(model: Model, nfe: int, batch: int) -> None:
    """Conditions that are denoisers cannot be cut: the first round is on one whole, of every plan. Raises ConfigError."""
    each = nfe * len(contenders(model, nfe, first_steps(None)))
    most = (EVALUATIONS - LATENTS * FINE) // (each + FINE // 2)
    if batch > most:
        raise ConfigError(
            f"a denoiser with the conditions of {batch} samples bound cannot be cut, and all plans on so many cost "
            f"{each * batch} evaluations at nfe={nfe}; pass denoisers of at most {most} samples, and "
            f"batch={2 ** int(math.log2(most))}"
        )


def _calibrated(model: Model, nfe: int, truth: _Truth, mean: Mean | None, batch: int, progress: bool) -> Calibration:
    entered = contenders(model, nfe, first_steps(mean), mean, truth.plan.guidance_scale)
    budget = EVALUATIONS - truth.evaluations
    with tqdm(total=budget, desc=f"calibrate NFE {nfe}", unit="eval", disable=not progress) as bar:
        found, spent = halve(entered, truth.examples, budget, batch, bar.update)
        bar.total = spent
    rows = [_rating(entrant) for entrant in found]
    best = made_for(model, rows[0].plan)
    return Calibration(best, rows, truth.plan.describe(), truth.error, truth.evaluations + spent)


def _rating(entrant: Entrant) -> Rating:
    contender = entrant.contender
    return Rating(contender.name, contender.plan, entrant.rmse, entrant.median, int(entrant.measured.sum()))
