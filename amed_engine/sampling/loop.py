"""The loop: evaluate, apply one matrix, repeat. Eager, captured, exported and differentiated runs all execute this code.

Nothing here looks at a tensor's values; control flow depends on the program alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.kernels import combine
from amed_engine.sampling.denoiser import (
    Denoised,
    Denoiser,
    analytic_first_step,
    as_denoised,
    copied,
    owned,
    parted,
    thresholded,
)
from amed_engine.sampling.modes import exactly
from amed_engine.solvers.base import Solver
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.program import PredictorLike, Program, Walk
from amed_engine.solvers.stage import Update, map_choice


class State(NamedTuple):
    """A trajectory between two evaluations: anchor, evaluation points and past directions, newest first.

    points: empty where the anchor itself is the one evaluation point.
    """

    x: Tensor
    points: tuple[Tensor, ...] = ()
    directions: tuple[Tensor, ...] = ()

    @property
    def y(self) -> tuple[Tensor, ...]:
        """The evaluation points."""
        return self.points or (self.x,)

    def at(self, y: Tensor) -> State:
        """This state with another evaluation point."""
        return self._replace(points=(y,)) if self.points else self._replace(x=y)

    def detach(self) -> State:
        points, directions = (tuple(t.detach() for t in tensors) for tensors in (self.points, self.directions))
        return State(self.x.detach(), points, directions)


def advance(state: State, denoised: tuple[Tensor, ...], update: Update) -> State:
    """Apply one update with one `combine` call; denoised holds D at each point of state.y."""
    tensors = (state.x, *state.points, *denoised, *state.directions)
    outputs = combine([tensors[j] for j in update.columns], update.coeffs)
    # Data prediction keeps D itself as its direction, without a copy.
    new = tuple(outputs[: update.new_directions]) if update.new_directions else denoised
    directions = (*new, *state.directions)[: update.keep]
    rest = outputs[update.new_directions :]
    x, *points = rest if update.moves_x else (state.x, *rest)
    return State(x, tuple(points), directions)


class Trajectory:
    """A program at work on one batch: the denoisers of its evaluations and the coefficients carried along.

    mean: what a first step "mean" starts about, each sample's (1 or B, ...); None is the program's one row.
    """

    def __init__(self, program: Program, denoiser: Denoiser, mean: Tensor | None = None):
        wrap = thresholded if program.solver.thresholds else lambda d: d
        about = None if program.afs != "mean" else _only_row(program.mean) if mean is None else mean
        analytic = partial(analytic_first_step, mean=about)
        self.program, self.network = program, wrap(denoiser)
        self.first = wrap(analytic) if program.afs else self.network
        self.walk = Walk(program, program.sigmas)

    def start(self, x: Tensor, noises: Sequence[Tensor]) -> State:
        """The state at sigmas[0], with the noises (B, ...) of unit variance that the program adds, in order."""
        return State(x, directions=tuple(reversed(noises)))

    def interval(self, state: State, i: int) -> list[State]:
        """The states after each evaluation from sigmas[i] to sigmas[i + 1]; the last is the one at its end.

        Intervals are to be run in order: past noise levels are carried along.
        """
        denoiser = self.network if i else self.first
        if not i:
            self._check_noises(len(state.directions))
        evaluated = evaluate(denoiser, state.y, (self.program.sigmas[i],))
        updates = self._updates(i, evaluated[0].features, state.x.shape[0])
        states = []
        for s, update in enumerate(updates):
            if s:
                evaluated = evaluate(self.network, state.y, updates[s - 1].sigma_net)
            state = advance(state, tuple(d.x0 for d in evaluated), update)
            states.append(state)
        return states

    def _check_noises(self, got: int) -> None:
        """A host that knows nothing of noises starts without."""
        if got != (needed := self.program.noises):
            remedy = (
                "pass noises= to sample, or seeds to Sampler.run, which draws them" if needed else "leave noises out"
            )
            raise ConfigError(
                f"{type(self.program.solver).__name__} on {self.program.intervals} intervals adds {needed} noises to each "
                f"sample, got {got}; {remedy}"
            )

    def _updates(self, i: int, features: Tensor | None, batch: int) -> tuple[Update, ...]:
        program, predictor = self.program, self.program.predictor
        if program.updates is not None:
            return program.updates[i]
        choice = predictor[i] if isinstance(predictor, Sequence) else predictor
        if callable(choice):
            sigma, sigma_next = (program.sigmas[k].expand(batch) for k in (i, i + 1))
            with exactly(sigma.device):
                choice, updates = _said(program.solver, choice, features, sigma, sigma_next)
            if updates is not None:
                return updates
        dtype = program.sigmas.dtype
        return self.walk.updates(i, map_choice(lambda c: c.to(dtype) if isinstance(c, Tensor) else c, choice))  # type: ignore[arg-type]


def _said(
    solver: Solver, predictor: Any, features: Tensor | None, sigma: Tensor, sigma_next: Tensor
) -> tuple[Any, tuple[Update, ...] | None]:
    """What a predictor says, or the updates that it makes of it."""
    fused = getattr(predictor, "fused", None)
    said, updates = fused(solver, features, sigma, sigma_next) if fused else (None, None)
    if said is None and updates is None:  # a caller's own function may write to what it is given
        levels = (sigma, sigma_next) if fused else (copied(sigma), copied(sigma_next))
        said = predictor(features, *levels)
    return said, updates


def _only_row(rows: Tensor | None) -> Tensor | None:
    if rows is not None and len(rows) > 1:
        raise ConfigError(
            "this first step starts about the mean answer of each sample's class, which is not known here; pass "
            "mean=mean_of_labels(program.mean, labels, guidance_scale)"
        )
    return rows


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
    return tuple(Denoised(d, f) for d, f in zip(x0.split(sizes), parted(features, sizes), strict=True))


def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    solver: Solver,
    predictor: PredictorLike | None = None,
    *,
    afs: FirstStep = False,
    mean: Tensor | None = None,
    denoise_to_zero: bool = False,
    trajectory: bool = False,
    noises: Tensor | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE from sigmas[0] to sigmas[-1].

    denoiser: (x, sigma: (B,)) -> D or (D, features). x: (B, ...), already scaled by sigmas[0]; the loop computes in its
    dtype. sigmas: (N + 1,) decreasing and positive. predictor: (features, sigma, sigma_next) -> Midpoint, or a
    sequence of those or of Midpoints, one per interval (Rows for "nonstationary"). afs: the first evaluation is replaced
    by its analytic estimate, about zero (True) or about `mean` (1 or B, ...) ("mean"). denoise_to_zero: one more
    evaluation at sigmas[-1], whose D is the result. noises: (B, N - 1, ...) of unit variance, which the solver "consistency",
    no integrator, adds after each evaluation but the last.
    Differentiable in x, the denoiser's and the predictor's parameters.
    Returns (B, ...), or with trajectory=True the state after every interval, the start included, (N + 1 [+ 1], B, ...).
    Raises ConfigError.
    """
    if not x.is_floating_point():
        raise ConfigError(f"x must be a floating-point tensor, got {x.dtype}")
    options = {"afs": afs, "mean": mean, "denoise_to_zero": denoise_to_zero}
    program = Program.build(solver, sigmas, predictor, **options).on(x.device, x.dtype)
    states = integrate(program, owned(denoiser), x, mean=program.mean, noises=_apart(noises, x))
    return torch.stack(states) if trajectory else states[-1]


def _apart(noises: Tensor | None, x: Tensor) -> tuple[Tensor, ...]:
    """noises (B, K, ...) one by one."""
    if noises is None:
        return ()
    if noises.dim() != x.dim() + 1 or noises.shape[:1] + noises.shape[2:] != x.shape or noises.dtype != x.dtype:
        raise ConfigError(
            f"noises must be (B, K, ...) like x, {x.dtype} of ({x.shape[0]}, K, {', '.join(map(str, x.shape[1:]))}), got "
            f"{noises.dtype} of {tuple(noises.shape)}"
        )
    return noises.unbind(1)


def integrate(
    program: Program,
    denoiser: Denoiser,
    x: Tensor,
    observe: Callable[[int, Tensor], None] | None = None,
    mean: Tensor | None = None,
    noises: Sequence[Tensor] = (),
) -> list[Tensor]:
    """`sample` for a program that is already built and on x's device: what is captured and exported.

    mean: see `Trajectory`. noises: see `Trajectory.start`. Raises ConfigError.

    Returns the states, start and end included. observe(interval, state) is called after each interval; the state of a
    predictor-corrector there is its prediction.
    """
    run = Trajectory(program, denoiser, mean)
    states, state = [x], run.start(x, noises)
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
