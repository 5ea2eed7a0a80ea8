"""Fitting a few coefficients to a teacher by Gauss-Newton, from forward evaluations alone.

The final sample is a smooth function of some tens of numbers theta: coefficients, midpoints, noise levels. For latents with
known solutions x*, least squares

    minimise  L(theta) = Σ |x_N(theta) - x*|²,    (JᵀJ + damping diag(JᵀJ)) step = -Jᵀ (x_N - x*)

converges in a handful of steps where gradient descent takes hundreds, since the coefficients of one row are strongly
correlated. J comes from finite differences: each number is nudged and the trajectory runs on from there, so a denoiser
needs no gradient: exported, compiled and closed ones serve as well. Levenberg 1944, Marquardt 1963.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, Denoiser, as_denoised, known_first
from amed_engine.sampling.loop import State, Trajectory, integrate
from amed_engine.sampling.modes import plain_defaults
from amed_engine.sampling.predictors.coefficient import CoefficientPredictor, summary
from amed_engine.solvers.program import Program
from amed_engine.training.candidate import Candidate, Coefficients

C = TypeVar("C", bound=Candidate)
Progress = Callable[[int, float], None]  # (iteration, loss after it)


class Example(NamedTuple):
    """Some latents: their denoiser with its conditions bound, starting points (B, ...) and the teacher's samples; the mean
    answer (1 or B, ...) of their labels, for candidates whose first step starts about it."""

    denoiser: Denoiser
    x: Tensor
    target: Tensor
    mean: Tensor | None = None

    def squares(self, end: Tensor) -> Tensor:
        """The mean square error of each latent's end, (B,) float64."""
        return (end.double() - self.target.double()).square().flatten(1).mean(1)


class Recorded(NamedTuple):
    """A trajectory with what it takes to branch off at any interval: state, walk and first evaluation there."""

    states: list[State]
    walks: list
    evaluations: list[Denoised]

    @property
    def end(self) -> Tensor:
        return self.states[-1].y[0]

    @classmethod
    def of(cls, program: Program, example: Example) -> Recorded:
        denoiser, x = example.denoiser, example.x
        firsts: list[Denoised] = []
        state, states, walks = State(x), [], []

        def remembering(y: Tensor, sigma: Tensor) -> Denoised:
            firsts.append(as_denoised(denoiser(y, sigma)))
            return firsts[-1]

        run, evaluations = Trajectory(program, remembering, example.mean), []
        for i in range(program.intervals):
            states.append(state)
            walks.append(copy.copy(run.walk))
            firsts.clear()
            state = run.interval(state, i)[-1]
            evaluations.append(firsts[0] if firsts else Denoised(x))  # none in an analytic first step
        return cls([*states, state], walks, evaluations)

    def branch(self, program: Program, example: Example, start: int, again: bool) -> Tensor:
        """Where another program ends that differs from interval `start` on; again: also in what is evaluated first."""
        denoiser = example.denoiser
        if not again and (start or not program.afs):
            denoiser = known_first(denoiser, self.evaluations[start])
        run, state = Trajectory(program, denoiser, example.mean), self.states[start]
        walk = self.walks[start]
        run.walk.past, run.walk.directions, run.walk.y_is_x = walk.past, walk.directions, walk.y_is_x
        for i in range(start, program.intervals):
            state = run.interval(state, i)[-1]
        return state.y[0]


@torch.no_grad()
def jacobian(candidate: Candidate, example: Example) -> tuple[Tensor, Tensor]:
    """(B, n, P) derivatives of the samples by theta, and their residuals (B, n), both float64."""
    theta = candidate.theta()
    recorded = Recorded.of(candidate.program(example.x), example)
    end = recorded.end.double().flatten(1)
    columns = []
    for p, probe in enumerate(candidate.probes()):
        other = theta.clone()
        other[p] += probe.nudge
        program = candidate.at(other).program(example.x)
        moved = recorded.branch(program, example, probe.start, probe.again)
        columns.append((moved.double().flatten(1) - end) / probe.nudge)
    columns = candidate.expanded(torch.stack(columns, dim=2), recorded.evaluations)
    return columns, end - example.target.double().flatten(1)


@dataclass
class Normal:
    """The normal equations of the least squares, added up over examples: JᵀJ (P, P) and Jᵀ residual (P,)."""

    matrix: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))
    gradient: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))

    def add(self, columns: Tensor, residual: Tensor) -> None:
        flat = columns.flatten(0, 1)
        self.matrix = self.matrix + flat.mT @ flat
        self.gradient = self.gradient + flat.mT @ residual.flatten()

    def step(self, damping: float, prior: Tensor, offset: Tensor, fixed: Collection[int] = ()) -> Tensor:
        """-(A + damping diag(A) + prior)^-1 (g + prior·offset): Marquardt's step, with a quadratic prior about zero.

        fixed: numbers that stay as they are.
        """
        diagonal = self.matrix.diagonal()
        system = self.matrix + torch.diag(damping * diagonal + prior + 1e-12 * diagonal.max())
        right = self.gradient + prior * offset
        free = torch.tensor([p for p in range(len(right)) if p not in fixed], device=right.device)
        step = torch.zeros_like(right)
        step[free] = -torch.linalg.solve(system[free][:, free], right[free])
        return step


@torch.no_grad()
def loss_of(candidate: Candidate, examples: Sequence[Example]) -> float:
    """Σ |x_N - x*|² over the examples."""
    total = 0.0
    for denoiser, x, target, mean in examples:
        end = integrate(candidate.program(x), denoiser, x, mean=mean)[-1]
        total += (end.double() - target.double()).square().sum().item()
    return total


@torch.no_grad()
def gauss_newton(
    candidate: C,
    examples: Sequence[Example],
    *,
    iterations: int = 10,
    ridge: float = 0.02,
    tolerance: float = 2e-3,
    report: Progress | None = None,
) -> C:
    """Gauss-Newton until an iteration gains less than `tolerance` of the loss. ridge: prior on the heads, relative."""
    damping, loss = 1e-3, loss_of(candidate, examples)
    for k in range(iterations):
        normal = Normal()
        for example in examples:
            normal.add(*jacobian(candidate, example))
        before = loss
        candidate, loss, damping = _descend(candidate, normal, examples, loss, damping, ridge)
        if report is not None:
            report(k, loss)
        if loss > before * (1 - tolerance):
            break
    return candidate


def _descend(
    candidate: C, normal: Normal, examples: Sequence[Example], loss: float, damping: float, ridge: float
) -> tuple[C, float, float]:
    """The first step, ever more damped, that lowers the loss; the candidate itself where none does."""
    prior = ridge * candidate.prior(normal.matrix.diagonal())
    # What nothing draws may be infinite, as the logit of r = 1 is.
    offset = candidate.theta().to(prior.device).where(prior > 0, 0.0)
    cost = loss + (prior * offset.square()).sum().item()
    while damping < 1e6:
        trial, step = _in_order_step(candidate, normal, damping, prior, offset)
        trial_loss = loss_of(trial, examples)
        if trial_loss + (prior * (offset + step).square()).sum().item() < cost:
            return trial, trial_loss, max(damping / 10, 1e-7)
        damping *= 10
    return candidate, loss, damping


def _in_order_step(candidate: C, normal: Normal, damping: float, prior: Tensor, offset: Tensor) -> tuple[C, Tensor]:
    """A step that keeps the noise levels in order: those that would meet their neighbours stay where they are."""
    fixed: set[int] = set()
    while True:
        step = normal.step(damping, prior, offset, fixed)
        trial = candidate.at(candidate.theta() + step.cpu())
        if not trial.collisions:
            return trial, step
        fixed |= trial.collisions


@torch.no_grad()
def adaptive(candidate: Coefficients, examples: Sequence[Example], codes: int) -> Coefficients:
    """The candidate with heads at zero that read the principal components of the bottleneck along its trajectories."""
    predictor = candidate.predictor
    runs = [Recorded.of(candidate.program(example.x), example) for example in examples]
    seen = [[run.evaluations[i] for run in runs] for i in range(predictor.intervals)]
    inputs = [None if part[0].features is None else torch.cat([*map(_summary, part)]).double().cpu() for part in seen]
    width = next((len(part[0]) for part in inputs if part is not None), 0)
    if not width:
        raise ConfigError("this model returns no bottleneck features to adapt to; use the variant without offsets")
    with plain_defaults():
        grown = CoefficientPredictor(**{**predictor.config, "codes": min(codes, width), "inputs": width})
    grown.coefficients.copy_(predictor.coefficients)
    for i, part in enumerate(inputs):
        if part is not None:
            grown.centre[i], grown.basis[i] = _whitening(part, grown.codes)
    return replace(candidate, predictor=grown)


def _summary(evaluation: Denoised) -> Tensor:
    return summary(evaluation.features, len(evaluation.x0))  # type: ignore[arg-type]


def _whitening(inputs: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Mean, and principal components scaled to unit variance, of (samples, inputs)."""
    mean = inputs.mean(0)
    _, s, v = torch.linalg.svd(inputs - mean, full_matrices=False)
    scale = (len(inputs) - 1) ** 0.5 / s[:codes].clamp_min(1e-6 * float(s[0]))
    basis = inputs.new_zeros(inputs.shape[1], codes)
    basis[:, : len(scale)] = v[:codes].mT * scale
    return mean, basis
