"""Predictors that are fitted rather than trained: constants, EPD, non-stationary and adaptive coefficients.

All are small enough for `gauss_newton`: latents are solved once by an accurate teacher, and Gauss-Newton matches the final
samples, end to end. A few hundred latents and some minutes on a CPU do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from amed_engine.engine.measure import mean_of
from amed_engine.engine.model import Model
from amed_engine.engine.notices import tell_of_zero
from amed_engine.engine.resolve import resolve
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoiser
from amed_engine.sampling.modes import leaving_modes, plain_defaults, plain_tensors
from amed_engine.sampling.predictors.coefficient import MAX_INTERVALS
from amed_engine.sampling.predictors.constant import ConstantPredictor
from amed_engine.solvers.mean import FirstStep, Mean, check_first_step
from amed_engine.solvers.plan import Plan, make_plan
from amed_engine.training.batches import Batches, BoundDenoiser, Conditions, mean_answer, mean_where_told
from amed_engine.training.candidate import Candidate, Constants, Fitted, nonstationary
from amed_engine.training.contenders import Contender, contenders, first_steps
from amed_engine.training.fit_report import Report
from amed_engine.training.gauss_newton import Example, Progress, adaptive, gauss_newton, loss_of
from amed_engine.training.halving import halve
from amed_engine.training.held_out import LATENTS, REPORTED, default_plan, fine_plan, judge, solved, unseen
from amed_engine.training.presets import TEACHER, made_for, noise_range

logger = logging.getLogger("amed_engine")

Variant = Literal["constants", "epd", "nonstationary", "adaptive"]
VARIANTS = get_args(Variant)
FIRST = 128  # latents for the first iterations, when the coefficients are still far off
COMPARED = 10_000  # evaluations that finding the best training-free plans may cost
_REMEDY = "fit to more latents (samples=), another variant or number of evaluations"


@dataclass(frozen=True)
class Effort:
    """How much is spent: latents in all and at once, how many starting points, and Gauss-Newton
    iterations from each on the first latents and then from the best on all."""

    samples: int = 512
    batch: int = 64
    starts: int = 2
    early: int = 6
    late: int = 4
    teacher_nfe: int = 24
    seed: int = 0

    def __post_init__(self):
        for name, low in (("samples", 8), ("batch", 1), ("starts", 1), ("early", 0), ("late", 1), ("teacher_nfe", 4)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")


@dataclass(frozen=True)
class Task:
    """What is to be learned: the variant, its evaluations, and for constants the solver they serve."""

    variant: Variant
    nfe: int = 5
    solver: str = "amed"
    solver_options: Mapping[str, Any] | None = None
    schedule: str = "time_uniform"
    rho: float | None = None
    afs: FirstStep | None = None
    guidance_scale: float | None = None
    points: int = 2  # of epd
    codes: int = 32  # of adaptive: principal components read from the bottleneck
    ridge: float = 0.05  # of adaptive: what draws the offsets to zero
    learn_sigmas: bool | None = None  # None: where the solver's rows do not depend on them

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ConfigError(f"variant must be one of {', '.join(VARIANTS)}; got {self.variant!r}")
        if self.variant == "adaptive" and (not isinstance(self.codes, int) or self.codes < 1):
            raise ConfigError(
                f"codes must be a number of components of at least 1, got {self.codes!r}; for none fit 'nonstationary'"
            )
        mine = (self.solver, self.schedule, self.rho) != ("amed", "time_uniform", None) or self.solver_options
        if self.learns_all and mine:
            raise ConfigError(
                f"variant={self.variant!r} learns its coefficients and starts from solvers of its own choice; leave solver, "
                "solver_options, schedule and rho out, or fit 'constants' or 'epd'"
            )

    @property
    def learns_all(self) -> bool:
        """Whether all coefficients are free, and no solver has a say but as a start."""
        return self.variant in ("nonstationary", "adaptive")


@leaving_modes
@plain_tensors()
def fit(
    model: Any,
    *,
    variant: Variant = "nonstationary",
    nfe: int | Sequence[int] = 5,
    solver: str = "amed",
    solver_options: Mapping[str, Any] | None = None,
    schedule: str = "time_uniform",
    rho: float | None = None,
    afs: FirstStep | None = None,
    points: int = 2,
    codes: int = 32,
    ridge: float = 0.05,
    learn_sigmas: bool | None = None,
    conditions: Conditions = None,
    guidance_scale: float | None = None,
    samples: int = 512,
    batch: int = 64,
    starts: int = 2,
    early: int = 6,
    late: int = 4,
    teacher_nfe: int = 24,
    seed: int = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shape: tuple[int, ...] | None = None,
    label_dim: int | None = None,
    progress: bool = True,
) -> Fitted | dict[int, Fitted]:
    """Fit a predictor to a model, end to end, by Gauss-Newton: minutes for small networks, and no gradient of theirs.

    model, sigma_min, sigma_max, shape, label_dim: as `Sampler` takes them. variant: "nonstationary", all coefficients and
    noise levels; "adaptive", per-sample offsets on top, from `codes` components of the bottleneck, drawn to zero by
    `ridge`; "constants", r and the two scales of every step of `solver` ("amed" or a plugin) on `schedule`; "epd", the
    same for `points` parallel points. nfe: one number, or several that share the teacher's work and give a dict.
    learn_sigmas: None learns noise levels where the rows do not depend on them. samples: latents solved by a teacher of
    teacher_nfe evaluations, `batch` at a time. starts, early, late: iterations on the first latents from each of the best
    training-free solvers, then on all of them. seed: of latents and labels; the global generators are untouched.
    conditions: None draws class labels where the model has any; else one entry per batch, as `distill` takes them.
    Returns predictors with their plan set, and `report`: how they compare with training-free plans, on the latents of the fit
    and on others (`report.held_out`); a log line tells, a warning where one of those was nearer. Raises ConfigError.
    """
    resolved = resolve(model, shape=shape, label_dim=label_dim, sigma_min=sigma_min, sigma_max=sigma_max)
    numbers = list(nfe) if isinstance(nfe, Sequence) else [nfe]
    if not numbers:
        raise ConfigError("nfe is empty; pass a number of evaluations, or several")
    effort = Effort(samples, batch, starts, early, late, teacher_nfe, seed)
    learns = (points, codes, ridge, learn_sigmas)
    task = Task(variant, numbers[0], solver, solver_options, schedule, rho, afs, guidance_scale, *learns)
    tasks = {number: replace(task, nfe=number) for number in numbers}
    for each in tasks.values():
        check_task(resolved, each)  # what cannot be is refused before any network runs
    examples, mean = draw_examples(resolved, task, effort, conditions)
    fitted: dict[int, Fitted] = {}
    for number, each in tasks.items():
        with tqdm(desc=f"fit NFE {number}", unit="step", total=starts * early + late, disable=not progress) as bar:
            fitted[number] = learn(resolved, each, effort, examples, _reporter(bar), mean)
    _judge(resolved, fitted, examples, effort)
    return fitted if isinstance(nfe, Sequence) else fitted[numbers[0]]


def _judge(model: Model, fitted: Mapping[int, Fitted], examples: list[Example], effort: Effort) -> None:
    """Put every predictor beside the plans that need none, on latents of its own, and log what came of it."""
    fine = fine_plan(model, max(fitted))
    fresh = list(unseen(examples, fine, effort.seed, max(8, min(LATENTS, effort.samples // 8)), effort.batch))
    for nfe, predictor in fitted.items():
        assert predictor.plan is not None
        free = [predictor.report.free, default_plan(model, nfe)]
        told = predictor.report._replace(held_out=judge(predictor.plan, predictor, free, fresh, fine, _REMEDY))
        predictor.report = told
        worse = told.held_out.lost or told.rmse > told.free_rmse
        logger.log(logging.WARNING if worse else logging.INFO, "NFE %d: %s", nfe, told, extra=REPORTED)


def _reporter(bar: tqdm) -> Progress:
    def report(_: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        bar.update()

    return report


def _mean(model: Model, task: Task, denoisers: list[Denoiser]) -> Mean | None:
    """What a first step "mean" would start about, where one is asked for or may be chosen."""
    sigma = noise_range(model)["sigma_max"]
    if task.afs == "mean":
        return mean_of(model, sigma)
    return mean_where_told(model, denoisers, sigma) if task.afs is None else None


def learn(
    model: Model,
    task: Task,
    effort: Effort,
    examples: list[Example],
    report: Progress | None = None,
    mean: Mean | None = None,
) -> Fitted:
    """`fit` for one task on examples that are drawn."""
    few = examples[: max(1, FIRST // effort.batch)]
    free = best_free(model, task, few, effort.batch, mean)
    starts = starts_of(model, task, free, mean)[: effort.starts]
    tried = [gauss_newton(start, few, iterations=effort.early, report=report) for start in starts]
    candidate = min(tried, key=lambda candidate: loss_of(candidate, few))
    candidate = gauss_newton(candidate, examples, iterations=effort.late, report=report)
    if task.variant == "adaptive":
        candidate = adaptive(candidate, examples, task.codes)  # type: ignore[arg-type]  # it learns all coefficients
        candidate = gauss_newton(candidate, examples, iterations=2, ridge=task.ridge)
    predictor = candidate.predictor
    predictor.plan = made_for(model, replace(candidate.plan, guidance_scale=task.guidance_scale))
    predictor.report = Report.of(candidate, free[0], examples, effort.batch)
    return predictor.eval()


def draw_examples(
    model: Model, task: Task, effort: Effort, conditions: Conditions = None
) -> tuple[list[Example], Mean | None]:
    """Latents with conditions, solved by the teacher, `batch` at a time, and the mean answer that a first step may start about;
    all conditions are looked at before."""
    span = {**noise_range(model), "guidance_scale": task.guidance_scale}
    teacher = make_plan(effort.teacher_nfe, afs=False, **span, **TEACHER)
    batch = min(effort.batch, effort.samples)
    data = Batches(model, teacher, batch, torch.Generator().manual_seed(effort.seed), conditions)
    counts = [min(batch, effort.samples - start) for start in range(0, effort.samples, batch)]
    drawn = [data.draw([slice(0, count)], count)[0] for count in counts]
    mean = _mean(model, task, [denoiser for denoiser, _ in drawn])
    means = [mean_answer(mean, denoiser) for denoiser, _ in drawn]
    return [solved(*pair, teacher, m) for pair, m in zip(drawn, means, strict=True)], mean


def best_free(
    model: Model, task: Task, examples: list[Example], rows: int, mean: Mean | None = None
) -> list[Contender]:
    """Training-free plans with the first steps that a task may have, the best on these latents first."""
    entered = contenders(model, task.nfe, _firsts(task, mean), mean, task.guidance_scale)
    whole = 0 if isinstance(examples[0].denoiser, BoundDenoiser) else len(examples[0].x)  # it cannot be cut
    budget = max(COMPARED, 2 * len(entered) * task.nfe * whole)
    return [entrant.contender for entrant in halve(entered, examples, budget, rows)[0]]


def _firsts(task: Task, mean: Mean | None) -> tuple[FirstStep, ...]:
    return first_steps(mean) if task.afs is None else (task.afs,)


def check_task(model: Model, task: Task) -> None:
    """Raises ConfigError for what cannot be fitted."""
    check_first_step(task.afs)
    if not task.learns_all:
        _own_plan(model, task, None)
        return
    intervals = max(each.plan.intervals for each in contenders(model, task.nfe, _firsts(task, None)))
    if intervals > MAX_INTERVALS:
        raise ConfigError(
            f"coefficients are fitted for at most {MAX_INTERVALS} intervals, got {intervals} for nfe={task.nfe}; "
            "ask for fewer evaluations (afs=False has one interval less)"
        )


def _own_plan(model: Model, task: Task, mean: Mean | None) -> Plan:
    """Of constants: the solver that they serve."""
    options = dict(task.solver_options or {}) | ({"points": task.points} if task.variant == "epd" else {})
    own = {"solver": task.solver, "options": options, "schedule": task.schedule, "rho": task.rho}
    return make_plan(task.nfe, midpoint=True, afs=task.afs, mean=mean, **own, **noise_range(model))


def starts_of(model: Model, task: Task, free: Sequence[Contender], mean: Mean | None = None) -> list[Candidate]:
    """Where the fit of a task may begin: training-free plans, in their order, that are linear in evaluations at falling noise
    levels; for constants DPM-Solver-2."""
    if not task.learns_all:
        plan = _own_plan(model, task, mean)
        tell_of_zero(task.afs, plan)
        with plain_defaults():
            constants = ConstantPredictor(plan.intervals, dict(plan.options).get("points", 1))
        return [Constants(plan, constants, learn_sigmas=bool(task.learn_sigmas))]
    learn_sigmas, low = task.learn_sigmas is None or task.learn_sigmas, noise_range(model)["sigma_min"]
    # About the mean the same can be learned as about zero, and more.
    plans = [contender.plan for contender in free if mean is None or contender.plan.afs is not True]
    every = (nonstationary(plan.program(), low, plan.mean) for plan in plans)
    return [replace(start, learn_sigmas=learn_sigmas) for start in every if not start.collisions]
