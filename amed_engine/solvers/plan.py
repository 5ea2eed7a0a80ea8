"""A plan, or recipe: everything but the network and the predictor's weights that decides what a latent becomes. JSON-able."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.solvers import USE_WITH_PREDICTOR, make_solver
from amed_engine.solvers.base import Solver, count_evaluations
from amed_engine.solvers.files import read_json, write_json
from amed_engine.solvers.program import PredictorLike, Program
from amed_engine.solvers.schedule import SCHEDULES, check_sigmas, make_schedule

# What the files of `amed search-schedule` say beside their plan.
LEVELS = {"format": "amed_levels", "version": 1}


@dataclass(frozen=True)
class Plan:
    """Solver, noise levels and their options: a recipe. Immutable, compared by value.

    sigmas: the noise levels, (intervals + 1) decreasing numbers. schedule, rho: the names they came from ("custom" if
    from none). options: the solver's. midpoint: whether a predictor refines every interval. guidance_scale: the
    classifier-free guidance it is for, None for none. model, dtype: fingerprint of the denoiser it was trained for and the
    dtype of that one's arithmetic, if any.
    """

    solver: str
    sigmas: tuple[float, ...]
    schedule: str = "custom"
    rho: float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    afs: bool = False
    denoise_to_zero: bool = False
    midpoint: bool = False
    guidance_scale: float | None = None
    model: str | None = None
    dtype: str | None = None

    def make_solver(self) -> Solver:
        return make_solver(self.solver, **dict(self.options))

    def program(self, predictor: PredictorLike | None = None) -> Program:
        """The program of this plan, with what a predictor says of its intervals."""
        options = {"afs": self.afs, "denoise_to_zero": self.denoise_to_zero}
        return Program.build(self.make_solver(), self.levels, predictor, **options)

    @property
    def levels(self) -> Tensor:
        """The noise levels as a float64 tensor."""
        return torch.tensor(self.sigmas, dtype=torch.float64)

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
        return rounds - int(self.afs) + int(self.denoise_to_zero)

    def through(self, inner: Sequence[float]) -> Plan:
        """The plan on other noise levels between its first and last."""
        return replace(self, sigmas=(self.sigmas[0], *inner, self.sigmas[-1]), schedule="custom", rho=None)

    def describe(self) -> str:
        """One line for people: solver, options, schedule, intervals."""
        options = "".join(f" {name}={value}" for name, value in self.options)
        rho = "" if self.rho is None else f" rho={self.rho:g}"
        plugin = " + predictor" if self.midpoint else ""
        afs = ", AFS" if self.afs else ""
        rounds = "" if self.rounds == self.nfe else f" in {self.rounds} rounds"
        return f"{self.solver}{options}{plugin}, {self.schedule}{rho}, {self.intervals} intervals{afs}, NFE {self.nfe}{rounds}"

    def to_json(self) -> dict:
        return {**asdict(self), "sigmas": list(self.sigmas), "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The plan that `to_json` wrote; anything else raises ConfigError."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a plan must be a JSON object, got {type(data).__name__}")
        if "version" in data:
            raise ConfigError(
                f"a plan of version {str(data['version'])[:40]} is not known here, where plans have no version; a newer "
                "amed_engine wrote it: update this one"
            )
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(map(str, data)) - names):
            raise ConfigError(f"plan has unknown entries {', '.join(unknown)}; expected {', '.join(sorted(names))}")
        _check_types(data)
        try:
            sigmas = check_sigmas(torch.tensor([float(s) for s in data["sigmas"]], dtype=torch.float64))
        except OverflowError as error:
            raise ConfigError(f"plan entry 'sigmas' holds a number beyond float64: {error}") from error
        options = tuple(sorted(data.get("options", {}).items()))
        plan = cls(**{**data, "sigmas": tuple(sigmas.tolist()), "options": options})
        plan.make_solver()
        return plan

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON, whole or not at all. Raises ConfigError for one that `load` would refuse, and OSError."""
        data = self.to_json()
        self.from_json(data)
        write_json(path, data)

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
    if not isinstance(data, Mapping) or any(data.get(name) != value for name, value in LEVELS.items()):
        raise ConfigError("expected format 'amed_levels', version 1; write one with `amed search-schedule`")
    return Plan.from_json(data.get("plan"))


_TYPES: dict[str, tuple[type, ...]] = {
    "solver": (str,),
    "sigmas": (list, tuple),
    "schedule": (str,),
    "rho": (int, float, type(None)),
    "options": (dict,),
    "afs": (bool,),
    "denoise_to_zero": (bool,),
    "midpoint": (bool,),
    "guidance_scale": (int, float, type(None)),
    "model": (str, type(None)),
    "dtype": (str, type(None)),
}


def _check_types(data: Mapping) -> None:
    if missing := [name for name in ("solver", "sigmas") if name not in data]:
        raise ConfigError(f"plan lacks {', '.join(missing)}")
    for name, value in data.items():
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and bool not in _TYPES[name]):
            expected = [kind.__name__ for kind in _TYPES[name] if kind not in (tuple, type(None))]
            raise ConfigError(f"plan entry {name!r} has type {type(value).__name__}, expected {' or '.join(expected)}")
    for name in ("rho", "guidance_scale"):
        if data.get(name) is not None and not -1e9 < data[name] < 1e9:
            raise ConfigError(f"plan entry {name!r} must be a finite number, got {str(data[name])[:40]}")
    if data.get("schedule", "custom") not in (*SCHEDULES, "custom"):
        raise ConfigError(
            f"plan entry 'schedule' must be custom, {', '.join(SCHEDULES)}; got {data['schedule'][:40]!r}"
        )
    if not all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in data["sigmas"]):
        raise ConfigError("plan entry 'sigmas' must be a list of numbers")


def make_plan(
    nfe: int | None,
    *,
    solver: str,
    options: Mapping[str, Any] | None = None,
    schedule: str | Tensor = "time_uniform",
    rho: float | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    alphas_cumprod: Tensor | None = None,
    afs: bool | None = None,
    midpoint: bool = False,
    guidance_scale: float | None = None,
) -> Plan:
    """The plan that spends `nfe` network evaluations with this solver.

    schedule: a name of `make_schedule`, or the noise levels themselves, which then decide the NFE (nfe, if given, must
    agree). afs: whether the first evaluation is analytic and free; None takes it wherever the NFE allows. Raises
    ConfigError where no whole number of intervals spends the NFE.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"solver_options must be a dict such as {{'max_order': 2}}, got {options!r}")
    made = make_solver(solver, **dict(options or {}))
    midpoint = midpoint or made.takes_predictor == "required"
    if midpoint and made.takes_predictor == "none":
        raise ConfigError(f"solver {solver!r} takes no predictor; {USE_WITH_PREDICTOR}")
    if not isinstance(schedule, (str, Tensor)):
        raise ConfigError(
            f"schedule must be a name ({', '.join(SCHEDULES)}) or a tensor of noise levels, got {type(schedule).__name__}"
        )
    if afs is not None and not isinstance(afs, bool):
        raise ConfigError(f"afs must be True, False or None, got {afs!r}")
    draft = Plan(
        solver, (), options=tuple(sorted((options or {}).items())), midpoint=midpoint, guidance_scale=guidance_scale
    )
    per_interval = made.evaluations(midpoint)
    nfe = None if nfe is None else _check_nfe(nfe)
    if isinstance(schedule, Tensor):
        return _with_levels(draft, schedule, nfe, afs, per_interval)
    if nfe is None:
        raise ConfigError("nfe must be given unless the schedule is a tensor of noise levels")
    afs, intervals = _intervals(nfe, per_interval, afs, solver)
    levels = make_schedule(schedule, intervals + 1, sigma_min, sigma_max, rho, alphas_cumprod)
    return replace(draft, sigmas=tuple(levels.tolist()), schedule=schedule, rho=rho, afs=afs)


def _with_levels(draft: Plan, levels: Tensor, nfe: int | None, afs: bool | None, per_interval: int) -> Plan:
    plan = replace(draft, sigmas=tuple(check_sigmas(levels).tolist()))
    if afs is None:
        afs = nfe is not None and plan.intervals * per_interval - 1 == nfe
    plan = replace(plan, afs=afs)
    if nfe is not None and plan.nfe != nfe:
        raise ConfigError(
            f"{plan.intervals + 1} noise levels cost {plan.nfe} evaluations with {plan.solver}, but nfe={nfe} was asked; "
            "leave nfe out or pass matching levels"
        )
    return plan


def _intervals(nfe: int, per_interval: int, afs: bool | None, solver: str) -> tuple[bool, int]:
    for choice in (True, False) if afs is None else (afs,):
        intervals, rest = divmod(nfe + int(choice), per_interval)
        if rest == 0 and intervals:
            return choice, intervals
    free = (0, 1) if afs is None else (int(afs),)
    # One interval's evaluations at least: fewer, plus a free one, would be no interval at all.
    possible = [n for n in range(1, 11) if any((n + f) % per_interval == 0 for f in free)]
    raise ConfigError(
        f"{solver} spends {per_interval} evaluations per interval{', the first one free' if afs else ''}: nfe={nfe} is "
        f"not a whole number of intervals; possible are {', '.join(map(str, possible))}, ..."
    )


def _check_nfe(nfe: Any) -> int:
    if not isinstance(nfe, Integral) or isinstance(nfe, bool) or nfe < 1:  # NumPy's integers too
        raise ConfigError(f"nfe must be a positive integer, got {nfe!r}")
    return int(nfe)


def best_training_free(nfe: int, **options: Any) -> Plan:
    """The training-free plan that came nearest to the exact solution at this NFE; see `amed compare`."""
    order = 2 if _check_nfe(nfe) <= 6 else 3
    return make_plan(nfe, solver="ipndm", options={"max_order": order}, **options)


def clamp_range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """A model's own noise range inside the one the published schedules use, 0.002 to 80."""
    low = max(float(sigma_min), 0.002)
    high = min(float(sigma_max), 80.0)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"need sigma_min < sigma_max, got {sigma_min} and {sigma_max}; pass both to the Sampler")
    return low, high
