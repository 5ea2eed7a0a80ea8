"""Which family of networks is meant: what the caller says, else the scheduler, else what is known of the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.discrete import PREDICTS, DiscreteSteps, alphas_cumprod
from amed_engine.adapters.facts import NetworkFacts
from amed_engine.adapters.family import Family
from amed_engine.adapters.flow import Flow
from amed_engine.adapters.karras import EDM, IDDPM, VE, VP, Consistency, ConsistencyFunction, Denoising
from amed_engine.adapters.schedulers import Told, betas_of, has_betas
from amed_engine.adapters.score import IndexedScore, Score
from amed_engine.errors import ConfigError

FAMILIES: dict[str, Callable[[], Family]] = {
    "denoised": Denoising,
    "consistency": ConsistencyFunction,
    "edm": EDM,
    "cm": Consistency,
    "vp": VP,
    "ve": VE,
    "iddpm": IDDPM,
    "flow": Flow,
    "score": Score,
}
PREDICTIONS = (*PREDICTS, *FAMILIES)
STEPS = ("fractional", "integer")


@dataclass(frozen=True)
class Wanted:
    """What `wrap` was told of the prediction; see there."""

    prediction: Any = None
    scheduler: Any = None
    betas: Any = None
    steps: Any = None
    levels: Any = None


def choose_family(wanted: Wanted, facts: NetworkFacts, says: Told | None) -> tuple[Family, str]:
    """The family, and a word on where it comes from. Raises ConfigError."""
    prediction, told = wanted.prediction, None if says is None else says.prediction
    if isinstance(prediction, Family):
        beside = [name for name in ("scheduler", "betas", "levels") if getattr(wanted, name) is not None]
        if beside:
            raise ConfigError(
                f"prediction={prediction.name!r} is a Family, which says all: leave scheduler and betas out, as levels; got "
                f"{', '.join(beside)}"
            )
        _check_steps(wanted)
        return copy.deepcopy(prediction), "given"  # it follows the network to its device
    known = told or facts.prediction
    name = prediction or known
    if name is None:
        raise ConfigError(
            f"prediction is not known of this network: pass one of {', '.join(PREDICTIONS)}, or scheduler=pipeline.scheduler"
        )
    if name not in PREDICTIONS:
        raise ConfigError(f"prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    if told is not None and told != name:
        raise ConfigError(f"prediction={name!r} was asked for, but the scheduler says {told!r}; leave prediction out")
    why = "given" if prediction else "from the scheduler" if told else "known of this network"
    _check_fits(wanted, name)
    if wanted.levels is not None:
        return IndexedScore(wanted.levels), why
    if name not in PREDICTS:
        return FAMILIES[name]() if says is None or says.family is None else says.family, why
    alphas, source = _choose_betas(wanted.betas, facts, wanted.scheduler)
    family = DiscreteSteps(name, alphas)
    if says is not None:
        family.sigma_min = max(family.sigma_min, says.sigma_min or family.sigma_min)
        family.sigma_max = min(family.sigma_max, says.sigma_max or family.sigma_max)
    return family, f"{why}; betas {source}"


def _check_fits(wanted: Wanted, name: str) -> None:
    """Options of other predictions than `name` are refused."""
    if name not in PREDICTS and wanted.betas is not None:
        raise ConfigError(f"betas are for {', '.join(PREDICTS)}, not for prediction={name!r}; leave them out")
    _check_steps(wanted)
    if name not in PREDICTS and wanted.steps is not None:
        raise ConfigError(f"steps are for {', '.join(PREDICTS)}, not for prediction={name!r}; leave them out")
    if name != "score" and wanted.levels is not None:
        raise ConfigError(
            f'levels are for prediction="score", told the index of one of them, not for {name!r}; leave them out, or pass '
            'betas= and steps="integer"'
        )


def _check_steps(wanted: Wanted) -> None:
    if wanted.steps not in (None, *STEPS):
        raise ConfigError(f"steps must be one of {', '.join(STEPS)}, got {wanted.steps!r}")


def _choose_betas(betas: Any, facts: NetworkFacts, scheduler: Any) -> tuple[Tensor, str]:
    if betas is not None:
        given = betas if isinstance(betas, Tensor) else alphas_cumprod(betas)
        _check_scheduler(given, scheduler)
        return given, "given as alphas_cumprod" if given is betas else f"{betas}, given"
    if scheduler is not None:
        return betas_of(scheduler), "from the scheduler"
    if facts.betas is not None:
        return alphas_cumprod(facts.betas), f"{facts.betas}, the custom for this network"
    return alphas_cumprod("linear"), "linear, assumed: pass betas=... if it was trained otherwise"


def _check_scheduler(alphas: Tensor, scheduler: Any) -> None:
    """Betas that are given beside a scheduler must be its own, up to the rounding of its float32."""
    if scheduler is None or not has_betas(scheduler):
        return
    own, given = betas_of(scheduler), alphas.detach().to("cpu", torch.float64)
    if given.shape != own.shape or not torch.allclose(given, own, rtol=1e-3, atol=0):
        raise ConfigError(
            f"betas contradict the scheduler: alphas_cumprod of {len(given)} steps ending at {float(given[-1]):.3g} were "
            f"given, {type(scheduler).__name__} has {len(own)} ending at {float(own[-1]):.3g}; leave one of them out"
        )
