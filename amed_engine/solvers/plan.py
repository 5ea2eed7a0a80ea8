"""A plan, or recipe: everything but the network and the predictor's weights that decides what a latent becomes. JSON-able."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.solvers import USE_WITH_PREDICTOR, with_options
from amed_engine.solvers.arguments import check_nfe
from amed_engine.solvers.base import Solver, check_first_step_of, count_evaluations, count_intervals
from amed_engine.solvers.files import read_json, write_json
from amed_engine.solvers.mean import NAMES, FirstStep, Mean, check_first_step, read_first_step
from amed_engine.solvers.plan_json import VERSION, current
from amed_engine.solvers.program import PredictorLike, Program
from amed_engine.solvers.schedule import SCHEDULES, check_sigmas, make_schedule

# Options that are told whatever they are: those that change results most.
_ALWAYS_TOLD = ("max_order", "thresholding")
# What the files of `amed search-schedule` say beside their plan.
LEVELS = {"format": "amed_levels", "version": 1}


@dataclass(frozen=True)
class Plan:
    """Solver, noise levels and their options: a recipe. Immutable, compared by value.

    sigmas: the noise levels, (intervals + 1) decreasing numbers. schedule, rho: the names they came from ("custom" if
    from none). options: the solver's, all of them. afs: the first step, see `make_plan`; mean: what "mean" starts about, None
    where it is yet to be measured. midpoint: whether a predictor refines every interval. guidance_scale: the
    classifier-free guidance it is for, None for none. model, dtype: fingerprint of the denoiser it was trained for and the
    dtype of that one's arithmetic, if any. wrapping: its settings that the fingerprint is of, JSON text, None if not known.
    """

    solver: str
    sigmas: tuple[float, ...]
    schedule: str = "custom"
    rho: float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    afs: FirstStep = False
    denoise_to_zero: bool = False
    midpoint: bool = False
    guidance_scale: float | None = None
    model: str | None = None
    dtype: str | None = None
    mean: Mean | None = None
    wrapping: str | None = None

    def __post_init__(self):
        # In full: plans that say the same are equal, and mean the same where a default is another one.
        made = self.make_solver()
        object.__setattr__(self, "options", tuple(sorted(made.options.items())))
        check_first_step_of(made, self.afs)
        if self.mean is not None and (self.afs != "mean" or not self.mean.is_for(self.sigmas[0], None, None)):
            raise ConfigError(
                f"a plan with afs={NAMES[self.afs]!r} from sigma {self.sigmas[0]:g} has no use for the mean answer at "
                f"{self.mean.sigma:g}; make it None, null in a file"
            )

    def make_solver(self) -> Solver:
        return with_options(self.solver, dict(self.options))

    def program(self, predictor: PredictorLike | None = None) -> Program:
        """The program of this plan, with what a predictor says of its intervals."""
        if self.afs == "mean" and self.mean is None:
            raise ConfigError(
                "this plan starts about the mean answer of a model, which is yet to be measured: Sampler(model, plan=plan) "
                "does, or pass mean=amed_engine.measure_mean(model) to make_plan"
            )
        rows = None if self.mean is None else self.mean.rows()
        options = {"afs": self.afs, "mean": rows, "denoise_to_zero": self.denoise_to_zero}
        return Program.build(self.make_solver(), self.levels, predictor, **options)

    @property
    def levels(self) -> Tensor:
        """The noise levels as a float64 tensor."""
        return torch.tensor(self.sigmas, dtype=torch.float64, device="cpu")

    @property
    def intervals(self) -> int:
        return len(self.sigmas) - 1

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        evaluations = count_evaluations(self.make_solver(), self.intervals, midpoint=self.midpoint, afs=self.afs)
        return evaluations + int(self.denoise_to_zero)

    @property
    def rounds(self) -> int:
        """Network calls one after another; fewer than the NFE where parallel points share one, as in EPD-Solver."""
        rounds = self.make_solver().rounds(self.midpoint) * self.intervals
        return rounds - int(bool(self.afs)) + int(self.denoise_to_zero)

    def through(self, inner: Sequence[float]) -> Plan:
        """The plan on other noise levels between its first and last."""
        return replace(self, sigmas=(self.sigmas[0], *inner, self.sigmas[-1]), schedule="custom", rho=None)

    def about(self, mean: Mean) -> Plan:
        """The plan with the mean answer that it starts about."""
        return replace(self, mean=mean)

    def describe(self) -> str:
        """One line for people: solver, options, schedule, intervals."""
        usual = self.make_solver().defaults()
        told = [(n, value) for n, value in self.options if n in _ALWAYS_TOLD or value != usual[n]]
        options = "".join(f" {name}={value}" for name, value in told)
        rho = "" if self.rho is None else f" rho={self.rho:g}"
        plugin = " + predictor" if self.midpoint else ""
        rounds = "" if self.rounds == self.nfe else f" in {self.rounds} rounds"
        spent = f"{self.intervals} intervals{self._first_step()}, NFE {self.nfe}{rounds}"
        return f"{self.solver}{options}{plugin}, {self.schedule}{rho}, {spent}"

    def _first_step(self) -> str:
        if self.afs != "mean":
            return ", AFS" if self.afs else ""
        return f", AFS about the {'mean' if self.mean is None else self.mean.without_numbers()}"

    def to_json(self) -> dict:
        """Every option in full, so that a file means the same wherever it is read."""
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "wrapping"}
        mean = None if self.mean is None else self.mean.to_json()
        written = {
            "sigmas": list(self.sigmas),
            "options": dict(self.options),
            "afs": NAMES[self.afs],
            "mean": mean,
        }
        told = {} if self.wrapping is None else {"wrapping": json.loads(self.wrapping)}
        return {"version": VERSION, **said, **written, **told}

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The plan that `to_json` wrote; anything else raises ConfigError."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a plan must be a JSON object, got {type(data).__name__}")
        usual = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        said = current(data, usual)
        try:
            sigmas = check_sigmas(torch.tensor([float(s) for s in said["sigmas"]], dtype=torch.float64, device="cpu"))
        except OverflowError as error:
            raise ConfigError(f"plan entry 'sigmas' holds a number beyond float64: {error}") from error
        options, afs = tuple(sorted(said["options"].items())), read_first_step(said["afs"])
        mean = None if said["mean"] is None else Mean.from_json(said["mean"])
        told = None if said["wrapping"] is None else json.dumps(said["wrapping"], sort_keys=True)
        rest = {"sigmas": tuple(sigmas.tolist()), "options": options, "afs": afs, "mean": mean, "wrapping": told}
        return cls(**{**said, **rest})

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON, whole or not at all. Raises ConfigError for one that `load` would refuse, and OSError."""
        data = self.to_json()
        self.from_json(data)
        write_json(path, data, streams=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """The plan of a file that `save` or `amed search-schedule` wrote. Raises FileFormatError, naming the file."""
        return read_json(path, _plan_of_file, "plan", "write one with Plan.save or `amed search-schedule`")


def _plan_of_file(data: Any) -> Plan:
    if not isinstance(data, Mapping) or "format" not in data:
        return Plan.from_json(data)
    if data["format"] != LEVELS["format"]:
        raise ConfigError(
            f"its format is {str(data['format'])[:40]!r}, expected what Plan.save or `amed search-schedule` writes; a table of "
            "`write_plan` is for Stepper, the C API and CuPy"
        )
    return plan_of_levels(data)


def plan_of_levels(data: Any) -> Plan:
    """The plan that `amed search-schedule` wrote. Raises ConfigError."""
    told = {name: data.get(name) for name in LEVELS} if isinstance(data, Mapping) else {}
    if told != LEVELS or isinstance(told["version"], bool):
        raise ConfigError("expected format 'amed_levels', version 1; write one with `amed search-schedule`")
    if unknown := sorted(set(map(str, data)) - {*LEVELS, "plan"}):
        raise ConfigError(f"noise levels have unknown entries {', '.join(unknown)[:200]}; the plan says everything")
    return Plan.from_json(data.get("plan"))


def make_plan(
    nfe: int | None,
    *,
    solver: str,
    options: Mapping[str, Any] | None = None,
    schedule: str | Tensor | None = None,
    rho: float | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    alphas_cumprod: Tensor | None = None,
    afs: FirstStep | None = None,
    mean: Mean | None = None,
    midpoint: bool = False,
    guidance_scale: float | None = None,
) -> Plan:
    """The plan that spends `nfe` network evaluations with this solver.

    schedule: a name of `make_schedule`, or the noise levels themselves, which then decide the NFE (nfe, if given, must
    agree); None is the solver's own, time_uniform, of "consistency" polynomial. afs: whether the first evaluation is analytic
    and free: False, True (for data about zero) or "mean" (about the mean answer of the model, `mean`, see `measure_mean`).
    None is the best that is at hand: "mean" where `mean` is given and the NFE allows it, else False, else True. Raises
    ConfigError where no whole number of intervals spends the NFE.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"solver_options must be a dict such as {{'max_order': 2}}, got {options!r}")
    made = with_options(solver, options or {})
    midpoint = midpoint or made.takes_predictor == "required"
    if midpoint and made.takes_predictor == "none":
        raise ConfigError(f"solver {solver!r} takes no predictor; {USE_WITH_PREDICTOR}")
    schedule = made.schedule if schedule is None else schedule
    if not isinstance(schedule, (str, Tensor)):
        raise ConfigError(
            f"schedule must be a name ({', '.join(SCHEDULES)}) or a tensor of noise levels, got {type(schedule).__name__}"
        )
    check_first_step(afs)
    check_first_step_of(made, afs)
    afs, mean = (afs, mean) if made.integrates else (False, None)
    draft = Plan(solver, (), options=tuple((options or {}).items()), midpoint=midpoint, guidance_scale=guidance_scale)
    per_interval = made.evaluations(midpoint)
    nfe = None if nfe is None else check_nfe(nfe)
    choices: tuple[FirstStep, ...] = (afs,) if afs is not None else (False, True) if mean is None else ("mean", False)
    if isinstance(schedule, Tensor):
        plan = _with_levels(draft, schedule, nfe, choices, per_interval)
    elif nfe is None:
        raise ConfigError("nfe must be given unless the schedule is a tensor of noise levels")
    else:
        first, intervals = _intervals(nfe, per_interval, choices, solver)
        levels = make_schedule(schedule, intervals + 1, sigma_min, sigma_max, rho, alphas_cumprod)
        plan = replace(draft, sigmas=tuple(levels.tolist()), schedule=schedule, rho=rho, afs=first)
    return replace(plan, mean=mean) if plan.afs == "mean" else plan


def _with_levels(draft: Plan, levels: Tensor, nfe: int | None, choices: Sequence[FirstStep], per_interval: int) -> Plan:
    plan = replace(draft, sigmas=tuple(check_sigmas(levels).tolist()))
    spends = {bool(choice): choice for choice in reversed(choices)}
    free = nfe is not None and plan.intervals * per_interval - 1 == nfe
    plan = replace(plan, afs=spends.get(free, choices[0]))
    if nfe is not None and plan.nfe != nfe:
        raise ConfigError(
            f"{plan.intervals + 1} noise levels cost {plan.nfe} evaluations with {plan.solver}, but nfe={nfe} was asked; "
            "leave nfe out or pass matching levels"
        )
    return plan


def _intervals(nfe: int, per_interval: int, choices: Sequence[FirstStep], solver: str) -> tuple[FirstStep, int]:
    """The first of the choices that makes a whole number of intervals, and that number."""
    for choice in choices:
        if intervals := count_intervals(per_interval, nfe, afs=choice):
            return choice, intervals
    free = {int(bool(choice)) for choice in choices}
    # One interval's evaluations at least: fewer, plus a free one, would be no interval at all.
    possible = [n for n in range(1, 11) if any((n + f) % per_interval == 0 for f in free)]
    raise ConfigError(
        f"{solver} spends {per_interval} evaluations per interval{', the first one free' if free == {1} else ''}: nfe={nfe} is "
        f"not a whole number of intervals; possible are {', '.join(map(str, possible))}, ..."
    )


MANY = 8  # evaluations, from which iPNDM-3 comes nearer than DEIS-3, and overshoots little under guidance


def best_training_free(
    nfe: int | None, *, afs: FirstStep | None = None, mean: Mean | None = None, **options: Any
) -> Plan:
    """The training-free plan that came nearest to the exact solution over networks of all kinds; see docs/solvers.md.

    afs, mean: as `make_plan` takes them. options: its other arguments, in place of what is chosen here.
    """
    measured = afs == "mean" or (afs is None and mean is not None)
    levels = options.get("schedule")
    told = len(levels) - 1 - bool(afs) if nfe is None and isinstance(levels, Tensor) else nfe
    many = told is not None and check_nfe(told) >= MANY
    solver, order = ("unipc", 2) if measured else ("ipndm", 3) if many else ("deis", 3)
    own = {"solver": solver, "options": {"max_order": order}, "schedule": "polynomial"}
    return make_plan(nfe, afs=afs, mean=mean, **{**own, **options})


def own_range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """A model's own noise range; where it has no end, that of the published schedules, 0.002 and 80."""
    low = 0.002 if sigma_min == 0 else float(sigma_min)
    high = 80.0 if sigma_max == math.inf else float(sigma_max)
    if not (math.isfinite(high) and 0 < low < high):
        raise ConfigError(f"need sigma_min < sigma_max, got {sigma_min} and {sigma_max}; pass both to the Sampler")
    return low, high
