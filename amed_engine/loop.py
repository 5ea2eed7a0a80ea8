"""The loop: evaluate, apply one matrix, repeat. Eager, captured, exported and differentiated runs all execute this code.

Nothing here looks at a tensor's values; control flow depends on the program alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.denoiser import Denoised, Denoiser, analytic_first_step, as_denoised, thresholded
from amed_engine.errors import ConfigError
from amed_engine.kernels import combine
from amed_engine.program import Choice, Layout, Midpoint, Stage, Update, fold, levels, map_choice, retained, trimmed
from amed_engine.schedule import check_sigmas
from amed_engine.solver import USE_WITH_PREDICTOR, Solver
from amed_engine.solvers import count_evaluations

Choose = Callable[[Tensor | None, Tensor, Tensor], Choice]
Predictor = Choose | Sequence[Choice] | Sequence[Choose]


class State(NamedTuple):
    """A trajectory between two evaluations: anchor, evaluation point(s) and past directions, newest first."""

    x: Tensor
    y: tuple[Tensor, ...]
    directions: tuple[Tensor, ...] = ()

    @classmethod
    def start(cls, x: Tensor) -> State:
        """At rest in x, which is anchor and evaluation point."""
        return cls(x, (x,))

    def detach(self) -> State:
        x = self.x.detach()
        y = (x,) if len(self.y) == 1 and self.y[0] is self.x else tuple(point.detach() for point in self.y)
        return State(x, y, tuple(d.detach() for d in self.directions))


@dataclass(frozen=True)
class Program:
    """Everything that is fixed before an image is seen: solver, noise levels, and the updates where nothing is learned.

    A predictor is a function (features, sigma, sigma_next) -> Midpoint (or Row, for the solver "nonstationary"), or a
    sequence of functions or of their answers, one per interval. Answers that are numbers are folded into the updates too.
    """

    solver: Solver
    sigmas: Tensor  # (n + 1,) float64 on the host, or on `device` in the state's precision after `on`
    predictor: Predictor | None = None
    afs: bool = False
    denoise_to_zero: bool = False
    updates: tuple[tuple[Update, ...], ...] | None = None

    @classmethod
    def build(
        cls,
        solver: Solver,
        sigmas: Tensor,
        predictor: Predictor | None = None,
        *,
        afs: bool = False,
        denoise_to_zero: bool = False,
    ) -> Program:
        program = cls(solver, check_sigmas(sigmas), predictor, afs, denoise_to_zero)
        program._check_predictor()
        return replace(program, updates=program._fold_all()) if program._is_static() else program

    @property
    def intervals(self) -> int:
        return len(self.sigmas) - 1

    @property
    def nfe(self) -> int:
        """Network evaluations per sample (parallel points count one each)."""
        evaluations = count_evaluations(self.solver, self.intervals, midpoint=self.predictor is not None, afs=self.afs)
        return evaluations + int(self.denoise_to_zero)

    def on(self, device: torch.device, dtype: torch.dtype) -> Program:
        """The same program with its constants on a device; low-precision states keep float32 coefficients."""
        precision = torch.promote_types(dtype, torch.float32)
        updates = self.updates and tuple(tuple(u.to(device, precision) for u in step) for step in self.updates)
        return replace(self, sigmas=self.sigmas.to(device, precision), updates=updates)

    def _check_predictor(self) -> None:
        takes, name = self.solver.midpoint, type(self.solver).__name__
        if self.predictor is None and takes == "required":
            raise ConfigError(
                f"solver {name} needs a predictor: one that amed_engine.fit or distill made for this model, or one entry "
                "per interval"
            )
        if self.predictor is not None and takes == "none":
            raise ConfigError(f"solver {name} takes no predictor; {USE_WITH_PREDICTOR}")
        if isinstance(self.predictor, Sequence) and len(self.predictor) != self.intervals:
            raise ConfigError(
                f"got a predictor of {len(self.predictor)} intervals for {self.intervals} intervals; pass one entry per "
                "interval"
            )

    def _is_static(self) -> bool:
        if not isinstance(self.predictor, Sequence):
            return self.predictor is None
        return not any(callable(choice) or _is_learning(choice) for choice in self.predictor)

    def _fold_all(self) -> tuple[tuple[Update, ...], ...]:
        walk = Walk(self, self.sigmas)
        host = [None] * self.intervals if self.predictor is None else [_on_host(choice) for choice in self.predictor]  # type: ignore[union-attr, arg-type]
        return tuple(walk.updates(i, choice) for i, choice in enumerate(host))


def _is_learning(choice: Choice) -> bool:
    coefficients: list = []
    map_choice(lambda c: coefficients.append(c) or c, choice)
    return any(isinstance(c, Tensor) and c.requires_grad for c in coefficients)


def _on_host(choice: Choice) -> Choice:
    # With the dtype, or a Python number would be rounded to float32 first.
    return map_choice(lambda c: torch.as_tensor(c, dtype=torch.float64).detach().cpu(), choice)


class Walk:
    """Asks the solver for its stages along a trajectory and folds them, carrying noise levels and layout only."""

    def __init__(self, program: Program, sigmas: Any, fold: Callable[..., Update] = fold):
        self.solver, self.sigmas, self.intervals, self.fold = program.solver, sigmas, len(sigmas) - 1, fold
        self.past: tuple[Tensor, ...] = ()
        self.directions, self.y_is_x = 0, True

    def updates(self, i: int, choice: Choice | None) -> tuple[Update, ...]:
        if choice is not None and not isinstance(choice, self.solver.choice):
            name = type(self.solver).__name__
            raise ConfigError(
                f"solver {name} needs a {self.solver.choice.__name__} for every interval, got {type(choice).__name__}; "
                "this predictor is for another solver"
            )
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        stages = self.solver.step(self.past, sigma, sigma_next, choice, i, self.intervals)
        stages = [trimmed(stage) for stage in stages]
        evaluated = sigma
        folded = []
        for s, stage in enumerate(stages):
            folded.append(self._fold(stage, levels(evaluated), retained(stages, s, self.solver.memory)))
            if not isinstance(evaluated, tuple):
                self.past = (evaluated, *self.past)[: self.solver.memory]
            evaluated = sigma_next if stage.sigma is None else stage.sigma
        return tuple(folded)

    def detach(self) -> None:
        """Cut the gradient to the noise levels of earlier intervals, for training interval by interval."""
        self.past = tuple(level.detach() for level in self.past)

    def _fold(self, stage: Stage, sigma: tuple[Tensor, ...], keep: int) -> Update:
        layout = Layout(sigma, self.y_is_x, self.directions, self.solver.data_prediction)
        update = self.fold(stage, layout, keep)
        self.directions, self.y_is_x = update.keep, update.x_is_y
        return update


def advance(state: State, denoised: tuple[Tensor, ...], update: Update) -> State:
    """Apply one update with one `combine` call; denoised holds D at each point of state.y."""
    points = () if len(state.y) == 1 and state.y[0] is state.x else state.y
    tensors = (state.x, *points, *denoised, *state.directions)
    outputs = combine([tensors[j] for j in update.columns], update.coeffs)
    # Data prediction keeps D itself as its direction, without a copy.
    new = tuple(outputs[: update.new_directions]) if update.new_directions else denoised
    directions = (*new, *state.directions)[: update.keep]
    rest = outputs[update.new_directions :]
    if not update.moves_x:
        return State(state.x, tuple(rest), directions)
    if update.x_is_y:
        return State(rest[0], (rest[0],), directions)
    return State(rest[0], tuple(rest[1:]), directions)


class Trajectory:
    """A program at work on one batch: the denoisers of its evaluations and the coefficients carried along."""

    def __init__(self, program: Program, denoiser: Denoiser):
        wrap = thresholded if program.solver.thresholds else lambda d: d
        self.program, self.network = program, wrap(denoiser)
        self.first = wrap(analytic_first_step) if program.afs else self.network
        self.walk = Walk(program, program.sigmas)

    def interval(self, state: State, i: int) -> list[State]:
        """The states after each evaluation from sigmas[i] to sigmas[i + 1]; the last is the one at its end.

        Intervals are to be run in order: past noise levels are carried along.
        """
        denoiser = self.network if i else self.first
        evaluated = evaluate(denoiser, state.y, (self.program.sigmas[i],))
        updates = self._updates(i, evaluated[0].features, state.x.shape[0])
        states = []
        for s, update in enumerate(updates):
            if s:
                evaluated = evaluate(self.network, state.y, updates[s - 1].sigma_net)
            state = advance(state, tuple(d.x0 for d in evaluated), update)
            states.append(state)
        return states

    def _updates(self, i: int, features: Tensor | None, batch: int) -> tuple[Update, ...]:
        program, predictor = self.program, self.program.predictor
        if program.updates is not None:
            return program.updates[i]
        choice = predictor[i] if isinstance(predictor, Sequence) else predictor
        if callable(choice):
            sigma, sigma_next = (program.sigmas[k].expand(batch) for k in (i, i + 1))
            fused = getattr(choice, "fused", None)
            step = None if fused is None else fused(features, sigma, sigma_next)
            if step is not None and (updates := program.solver.fused(step)) is not None:
                return updates
            choice = choice(features, sigma, sigma_next) if step is None else Midpoint(*step[:3])
        dtype = program.sigmas.dtype
        return self.walk.updates(i, map_choice(lambda c: c.to(dtype) if isinstance(c, Tensor) else c, choice))  # type: ignore[arg-type]


def evaluate(denoiser: Denoiser, y: tuple[Tensor, ...], sigma: tuple[Tensor, ...] | None) -> tuple[Denoised, ...]:
    """The denoiser at each point, several points in one batched call; sigma: () or (B,) per point."""
    assert sigma is not None
    # shape[0], not len(): a symbolic batch survives export.
    batch, dtype = y[0].shape[0], y[0].dtype
    x = y[0] if len(y) == 1 else torch.cat(y)
    sigmas = torch.cat([level.expand(batch) for level in sigma])
    x0, features = as_denoised(denoiser(x, sigmas))
    if torch.promote_types(x0.dtype, dtype) != dtype:
        x0 = x0.to(dtype)
    if len(y) == 1:
        return (Denoised(x0, features),)
    sizes = [batch] * len(y)  # sizes, not one: how many pieces that makes would be a question to a symbolic batch
    split = [None] * len(y) if features is None else features.split(sizes)
    return tuple(Denoised(d, f) for d, f in zip(x0.split(sizes), split, strict=True))


def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    solver: Solver,
    predictor: Predictor | None = None,
    *,
    afs: bool = False,
    denoise_to_zero: bool = False,
    trajectory: bool = False,
) -> Tensor:
    """Integrate the probability-flow ODE from sigmas[0] to sigmas[-1].

    denoiser: (x, sigma: (B,)) -> D or (D, features). x: (B, ...), already scaled by sigmas[0]; the loop computes in its
    dtype. sigmas: (N + 1,) decreasing and positive. predictor: (features, sigma, sigma_next) -> Midpoint, or a
    sequence of those or of Midpoints, one per interval (Rows for "nonstationary"). afs: the first evaluation is replaced
    by its analytic estimate. denoise_to_zero: one more evaluation at sigmas[-1], whose D is the result.
    Differentiable in x, the denoiser's and the predictor's parameters.
    Returns (B, ...), or with trajectory=True the state after every interval, the start included, (N + 1 [+ 1], B, ...).
    Raises ConfigError.
    """
    if not x.is_floating_point():
        raise ConfigError(f"x must be a floating-point tensor, got {x.dtype}")
    program = Program.build(solver, sigmas, predictor, afs=afs, denoise_to_zero=denoise_to_zero)
    states = integrate(program.on(x.device, x.dtype), denoiser, x)
    return torch.stack(states) if trajectory else states[-1]


def integrate(
    program: Program, denoiser: Denoiser, x: Tensor, observe: Callable[[int, Tensor], None] | None = None
) -> list[Tensor]:
    """`sample` for a program that is already built and on x's device: what is captured and exported.

    Returns the states, start and end included. observe(interval, state) is called after each interval; the state of a
    predictor-corrector there is its prediction.
    """
    states, state = [x], State.start(x)
    run = Trajectory(program, denoiser)
    for i in range(program.intervals):
        path = run.interval(state, i)
        state = path[-1]
        if i and program.solver.corrects:
            states[-1] = path[0].x
        states.append(state.y[0])
        if observe is not None:
            observe(i, state.y[0])
    if program.denoise_to_zero:
        states.append(evaluate(denoiser, (states[-1],), (program.sigmas[-1],))[0].x0)
    return states
