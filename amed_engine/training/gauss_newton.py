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
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, Denoiser, as_denoised, known_first
from amed_engine.sampling.loop import State, Trajectory, integrate
from amed_engine.sampling.predictors.coefficient import CoefficientPredictor, summary
from amed_engine.solvers.program import Program
from amed_engine.training.candidate import Candidate


class Example(NamedTuple):
    """Some latents: their denoiser with its conditions bound, starting points (B, ...) and the teacher's samples."""

    denoiser: Denoiser
    x: Tensor
    target: Tensor


class Run(NamedTuple):
    """A trajectory with what it takes to branch off at any interval: state, walk and first evaluation there."""

    states: list[State]
    walks: list
    evaluations: list[Denoised]

    @property
    def end(self) -> Tensor:
        return self.states[-1].y[0]

    @classmethod
    def of(cls, program: Program, denoiser: Denoiser, x: Tensor) -> Run:
        firsts: list[Denoised] = []
        state, states, walks = State(x), [], []

        def remembering(y: Tensor, sigma: Tensor) -> Denoised:
            firsts.append(as_denoised(denoiser(y, sigma)))
            return firsts[-1]

        run, evaluations = Trajectory(program, remembering), []
        for i in range(program.intervals):
            states.append(state)
            walks.append(copy.copy(run.walk))
            firsts.clear()
            state = run.interval(state, i)[-1]
            evaluations.append(firsts[0] if firsts else Denoised(x))  # none in an analytic first step
        return cls([*states, state], walks, evaluations)

    def branch(self, program: Program, denoiser: Denoiser, start: int, again: bool) -> Tensor:
        """Where another program ends that differs from interval `start` on; again: also in what is evaluated first."""
        if not again and (start or not program.afs):
            denoiser = known_first(denoiser, self.evaluations[start])
        run, state = Trajectory(program, denoiser), self.states[start]
        walk = self.walks[start]
        run.walk.past, run.walk.directions, run.walk.y_is_x = walk.past, walk.directions, walk.y_is_x
        for i in range(start, program.intervals):
            state = run.interval(state, i)[-1]
        return state.y[0]


@torch.no_grad()
def jacobian(candidate: Candidate, example: Example) -> tuple[Tensor, Tensor, Run]:
    """(B, n, P) derivatives of the samples by theta, and their residuals (B, n), both float64, and the run itself."""
    theta, nudges, starts = candidate.theta(), candidate.nudges(), candidate.starts()
    own = len(candidate._numbers())
    run = Run.of(candidate.program(example.x), example.denoiser, example.x)
    end = run.end.double().flatten(1)
    columns = []
    for p, (nudge, start) in enumerate(zip(nudges, starts, strict=True)):
        other = candidate.at(theta + nudge * (torch.arange(len(theta)) == p))
        # A noise level changes what the network is told, of an evaluation that is not the first of a free row.
        again = p >= own and isinstance(candidate.predictor, CoefficientPredictor)
        moved = run.branch(other.program(example.x), example.denoiser, start, again)
        columns.append((moved.double().flatten(1) - end) / nudge.item())
    return torch.stack(columns, dim=2), end - example.target.double().flatten(1), run


def expanded(columns: Tensor, candidate: Candidate, run: Run) -> Tensor:
    """The Jacobian with columns for the heads: an offset w·phi of a coefficient acts like the coefficient, times phi."""
    predictor = candidate.predictor
    if not isinstance(predictor, CoefficientPredictor) or predictor.heads is None:
        return columns
    codes = [predictor.code(evaluation.features, i) for i, evaluation in enumerate(run.evaluations)]
    blank = columns.new_zeros(len(columns), predictor.codes)
    phi = torch.stack(
        [blank if (code := codes[i]) is None else code for i, _ in candidate.free], dim=1
    )  # (B, free, codes)
    heads = columns[:, :, : len(candidate.free), None] * phi[:, None]
    return torch.cat([columns, heads.flatten(2)], dim=2)


@dataclass
class Normal:
    """The normal equations of the least squares, added up over examples, and the loss."""

    matrix: Tensor | None = None
    gradient: Tensor | None = None
    loss: float = 0.0

    def add(self, columns: Tensor, residual: Tensor) -> None:
        flat = columns.flatten(0, 1)
        matrix, gradient = flat.mT @ flat, flat.mT @ residual.flatten()
        self.matrix = matrix if self.matrix is None else self.matrix + matrix
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        self.loss += residual.square().sum().item()

    def step(self, damping: float, prior: Tensor, offset: Tensor, fixed: Collection[int] = ()) -> Tensor:
        """-(A + damping diag(A) + prior)^-1 (g + prior·offset): Marquardt's step, with a quadratic prior about zero.

        fixed: numbers that stay as they are.
        """
        assert self.matrix is not None
        assert self.gradient is not None
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
    for denoiser, x, target in examples:
        end = integrate(candidate.program(x), denoiser, x)[-1]
        total += (end.double() - target.double()).square().sum().item()
    return total


@torch.no_grad()
def gauss_newton(
    candidate: Candidate,
    examples: Sequence[Example],
    *,
    iterations: int = 10,
    ridge: float = 0.02,
    tolerance: float = 2e-3,
    report: Callable[[int, float], None] | None = None,
) -> Candidate:
    """Gauss-Newton until an iteration gains less than `tolerance` of the loss. ridge: prior on the heads, relative."""
    damping, loss = 1e-3, loss_of(candidate, examples)
    for k in range(iterations):
        normal = Normal()
        for example in examples:
            columns, residual, run = jacobian(candidate, example)
            normal.add(expanded(columns, candidate, run), residual)
        before = loss
        candidate, loss, damping = _descend(candidate, normal, examples, loss, damping, ridge)
        if report is not None:
            report(k, loss)
        if loss > before * (1 - tolerance):
            break
    return candidate


def _descend(
    candidate: Candidate, normal: Normal, examples: Sequence[Example], loss: float, damping: float, ridge: float
) -> tuple[Candidate, float, float]:
    """The first step, ever more damped, that lowers the loss; the candidate itself where none does."""
    heads, prior = _prior(candidate, normal, ridge)
    cost = loss + (prior * heads.square()).sum().item()
    while damping < 1e6:
        trial, step = _in_order_step(candidate, normal, damping, prior, heads)
        trial_loss = loss_of(trial, examples)
        if trial_loss + (prior * (heads + step).square()).sum().item() < cost:
            return trial, trial_loss, max(damping / 10, 1e-7)
        damping *= 10
    return candidate, loss, damping


def _in_order_step(
    candidate: Candidate, normal: Normal, damping: float, prior: Tensor, heads: Tensor
) -> tuple[Candidate, Tensor]:
    """A step that keeps the noise levels in order: those that would meet their neighbours stay where they are."""
    fixed: set[int] = set()
    while True:
        step = normal.step(damping, prior, heads, fixed)
        trial = _stepped(candidate, step)
        if not trial.collisions:
            return trial, step
        fixed |= trial.collisions


def _prior(candidate: Candidate, normal: Normal, ridge: float) -> tuple[Tensor, Tensor]:
    """Where the heads are, and the weight that draws each to zero; zeros for theta."""
    assert normal.matrix is not None
    own, predictor = len(candidate.theta()), candidate.predictor
    heads = torch.zeros(len(normal.matrix), dtype=torch.float64, device=normal.matrix.device)
    prior = torch.zeros_like(heads)
    if isinstance(predictor, CoefficientPredictor) and predictor.heads is not None:
        places = candidate.free
        heads[own:] = torch.cat([predictor.heads.detach()[place] for place in places])
        prior[own:] = ridge * normal.matrix.diagonal()[: len(places)].repeat_interleave(predictor.codes)
    return heads, prior


def _stepped(candidate: Candidate, step: Tensor) -> Candidate:
    own = len(candidate.theta())
    moved = candidate.at(candidate.theta() + step[:own].cpu())
    predictor = moved.predictor
    if isinstance(predictor, CoefficientPredictor) and predictor.heads is not None:
        with torch.no_grad():
            for place, change in zip(candidate.free, step[own:].split(predictor.codes), strict=True):
                predictor.heads[place] += change
    return moved


@torch.no_grad()
def adaptive(candidate: Candidate, examples: Sequence[Example], codes: int) -> Candidate:
    """The candidate with heads at zero that read the principal components of the bottleneck along its trajectories."""
    predictor = candidate.predictor
    assert isinstance(predictor, CoefficientPredictor)
    runs = [Run.of(candidate.program(x), denoiser, x) for denoiser, x, _ in examples]
    seen = [[run.evaluations[i].features for run in runs] for i in range(predictor.intervals)]
    inputs = [None if part[0] is None else torch.cat([summary(f) for f in part]).double().cpu() for part in seen]  # type: ignore[arg-type]
    width = next((len(part[0]) for part in inputs if part is not None), 0)
    if not width:
        raise ConfigError("this model returns no bottleneck features to adapt to; use the variant without offsets")
    grown = CoefficientPredictor(
        predictor.intervals, predictor.sigma_max, afs=predictor.afs, codes=min(codes, width), inputs=width
    )
    grown.coefficients.copy_(predictor.coefficients)
    for i, part in enumerate(inputs):
        if part is not None:
            grown.centre[i], grown.basis[i] = _whitening(part, grown.codes)
    return replace(candidate, predictor=grown)


def _whitening(inputs: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Mean, and principal components scaled to unit variance, of (samples, inputs)."""
    mean = inputs.mean(0)
    _, s, v = torch.linalg.svd(inputs - mean, full_matrices=False)
    scale = (len(inputs) - 1) ** 0.5 / s[:codes].clamp_min(1e-6 * float(s[0]))
    basis = inputs.new_zeros(inputs.shape[1], codes)
    basis[:, : len(scale)] = v[:codes].mT * scale
    return mean, basis
