"""What the integrations share: a program for a predictor on given noise levels, and a denoiser that is listened to."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amed_engine.checkpoints import load_predictor
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, Denoiser, as_denoised, mean_of_labels, owned
from amed_engine.sampling.predictors import Predictor
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.sampling.predictors.constant import ConstantPredictor
from amed_engine.solvers import make_solver
from amed_engine.solvers.mean import FirstStep, Mean, check_first_step
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program
from amed_engine.solvers.schedule import check_sigmas
from amed_engine.solvers.stage import Midpoint

AnyPredictor = Predictor | Sequence[Midpoint] | str | os.PathLike

# Hosts compute their schedules in float32, and Karras' seventh power multiplies the rounding.
SAME_LEVEL = 1e-4


def open_predictor(predictor: Any) -> Predictor | list[Midpoint]:
    """A predictor, the one in a file, or constants: one Midpoint, or (r, scale_dir, scale_time), per interval."""
    if isinstance(predictor, (str, os.PathLike)):
        return load_predictor(predictor)
    if isinstance(predictor, Predictor):
        return predictor
    if isinstance(predictor, Sequence) and all(isinstance(m, Sequence) and 1 <= len(m) <= 3 for m in predictor):
        return [Midpoint(*midpoint) for midpoint in predictor]
    raise ConfigError(
        f"predictor must be one of this package, a path to one, or one Midpoint per interval, got {type(predictor).__name__}"
    )


def constants(predictor: AMEDPredictor | ConstantPredictor, sigmas: Tensor) -> list[Midpoint]:
    """What the predictor says without features, one Midpoint of numbers per interval of `sigmas` (N + 1,)."""
    if isinstance(predictor, ConstantPredictor):
        return [Midpoint(*map(float, midpoint)) for midpoint in predictor.choices()]
    exact = copy.deepcopy(predictor).to("cpu", torch.float64).eval()
    said: Any = Program.build(make_solver("amed"), sigmas, exact).frozen().predictor
    return [Midpoint(*map(float, midpoint)) for midpoint in said]


def without_zero(sigmas: Tensor) -> Tensor:
    """The noise levels without the level 0 that k-diffusion and its relatives append; no solver here evaluates there."""
    sigmas = torch.as_tensor(sigmas, device=getattr(sigmas, "device", "cpu"))
    return sigmas[:-1] if sigmas.dim() == 1 and len(sigmas) > 2 and float(sigmas[-1]) == 0 else sigmas


def make_program(
    predictor: AnyPredictor, sigmas: Tensor, afs: FirstStep, like: Tensor, mean: Tensor | None = None
) -> Program:
    """The program of a predictor on the host's noise levels, on the device and in the precision of `like` (B, ...).

    A predictor's plan decides the solver, and must agree with the levels and with afs. mean: what a first step "mean" starts
    about, (1 or B, ...); None is the plan's where it has one for all. Raises ConfigError.
    """
    predictor = open_predictor(predictor)
    plan = predictor.plan if isinstance(predictor, Predictor) else None
    levels = check_sigmas(without_zero(sigmas))
    if plan is not None:
        check_plan(plan, levels, afs)
    solver = make_solver("amed") if plan is None else plan.make_solver()
    choices = predictor
    if isinstance(predictor, Predictor):
        # A copy: the caller's predictor keeps its device, precision and mode.
        precision = torch.promote_types(like.dtype, torch.float32)
        choices = copy.deepcopy(predictor).to(like.device, precision).eval().choices()
    zero = plan is not None and plan.denoise_to_zero
    options = {"afs": afs, "mean": _start(plan, afs, mean, like), "denoise_to_zero": zero}
    return Program.build(solver, levels, choices, **options).on(like.device, like.dtype)


def _start(plan: Plan | None, afs: FirstStep, mean: Tensor | None, like: Tensor) -> Tensor | None:
    """What the first step starts about: the mean answer given, else the plan's one."""
    check_first_step(afs)
    if afs != "mean":
        if mean is not None:
            raise ConfigError(f"a mean answer goes with afs='mean', got afs={afs!r}; leave mean out")
        return None
    if mean is None and plan is not None and plan.mean is not None:
        mean = plan.mean.rows()
        if len(mean) > 1:
            raise ConfigError(
                "this predictor's plan has a mean answer for each class, and which is meant is not known here; pass mean="
                "mean_of_labels(predictor.plan.mean.rows(), labels, guidance_scale) of amed_engine.sampling.denoiser"
            )
    if mean is None:
        raise ConfigError(
            "a first step about the mean answer of a model needs one; pass mean=amed_engine.measure_mean(model).rows(), or "
            "another afs"
        )
    check_start(mean, like)
    return mean


def check_start(mean: Tensor | None, like: Tensor) -> None:
    """A ConfigError where samples like this (B, ...) cannot start about a mean answer (1 or B, ...); None is for any."""
    if mean is not None and (mean.shape[1:] != like.shape[1:] or len(mean) not in {1, len(like)}):
        raise ConfigError(
            f"this first step starts about a mean answer of shape {tuple(mean.shape)}, got samples of {tuple(like.shape)}; "
            "sample in the shape that it was measured in, or measure one in this: amed_engine.measure_mean(model, shape=...)"
        )


def one_mean(plan: Plan) -> Mean | None:
    """The mean answer for hosts that see no classes: the plan's one, or that of any class under the plan's guidance.

    None where the plan starts otherwise. Raises ConfigError where there is one for each of several classes.
    """
    if plan.afs != "mean":
        return None
    if plan.mean is None:
        raise ConfigError(
            "this plan's mean answer is yet to be measured; pass plan.about(amed_engine.measure_mean(model))"
        )
    rows = plan.mean.rows()
    if len(rows) > 2:
        raise ConfigError(
            f"this plan starts about a mean answer for each of {plan.mean.classes} classes, and no class is seen here; use "
            "Sampler or AMEDPipeline, or a predictor trained with another afs"
        )
    if len(rows) == 1:
        return plan.mean
    rows = mean_of_labels(rows, torch.ones(1, 1, device="cpu"), plan.guidance_scale)
    facts = {name: getattr(plan.mean, name) for name in ("sigma", "latents", "model", "dtype")}
    return Mean.of(rows, classes=0, **facts)


def check_plan(plan: Plan, levels: Tensor, afs: FirstStep) -> None:
    """A ConfigError where a predictor is asked to work off the noise levels, or the first step, it was trained for."""
    if len(levels) != len(plan.sigmas) or not torch.allclose(levels, plan.levels, rtol=SAME_LEVEL, atol=0):
        raise ConfigError(
            f"this predictor was trained for {plan.describe()} from sigma {plan.sigmas[0]:g} to {plan.sigmas[-1]:g}, got "
            f"{len(levels) - 1} intervals from {float(levels[0]):g} to {float(levels[-1]):g}; pass sigmas=predictor.plan.levels"
        )
    if afs != plan.afs:
        raise ConfigError(
            f"this predictor was trained for afs={plan.afs!r}, got afs={afs!r}; pass afs=predictor.plan.afs"
        )


class Recorder:
    """A host's denoiser, that remembers the first answer since `first` was cleared."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = owned(denoiser)
        self.first: Denoised | None = None

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        denoised = as_denoised(self.denoiser(x, sigma))
        self.first = self.first or denoised
        return denoised
