"""One round of training: the student's losses against the teacher's states, and the predictor's steps down them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amed_engine.errors import ConfigError, NonFiniteError
from amed_engine.sampling.denoiser import Denoised, Denoiser, as_denoised
from amed_engine.sampling.loop import State, Trajectory
from amed_engine.sampling.modes import plain_defaults
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program
from amed_engine.solvers.stage import Midpoint
from amed_engine.training.batches import Batches, mean_answer
from amed_engine.training.ranks import Ranks
from amed_engine.training.teacher import Loss, Teacher

MAX_SKIPPED = 3  # non-finite losses in a row after which training stops


class Round(NamedTuple):
    """What `on_round` gets after each batch.

    images: seen so far. losses: of every interval, or one at the end for "end_to_end". midpoints: (r, scale_dir,
    scale_time) of every interval, averaged over the batch. skipped: steps left out so far for a non-finite loss or gradient.
    """

    images: int
    losses: list[float]
    midpoints: list[tuple[float, float, float]]
    skipped: int

    def row(self) -> list[float]:
        """All of it in a row: images, skipped, the losses, and r, scale_dir, scale_time interval by interval."""
        return [self.images, self.skipped, *self.losses, *sum(self.midpoints, ())]

    @classmethod
    def of(cls, row: list[float], intervals: int) -> Round:
        """The reverse of `row`."""
        losses, midpoints = row[2 : -3 * intervals], row[-3 * intervals :]
        triples = [(midpoints[k], midpoints[k + 1], midpoints[k + 2]) for k in range(0, len(midpoints), 3)]
        return cls(int(row[0]), losses, triples, int(row[1]))


class Watched:
    """A predictor that remembers, per interval, the sum over samples of what it said."""

    def __init__(self, predictor: AMEDPredictor, intervals: int, device: torch.device):
        self.predictor, self.i = predictor, 0
        self.sums = torch.zeros(intervals, 3, dtype=torch.float32, device=device)

    def __call__(self, features: Tensor | None, sigma: Tensor, sigma_next: Tensor) -> Midpoint:
        midpoint = self.predictor(features, sigma, sigma_next)
        self.sums[self.i] += torch.stack([f.detach().expand(len(sigma)).sum().float() for f in midpoint])  # type: ignore[union-attr]
        return midpoint


class LearnedLevels(nn.Module):
    """Noise levels to learn that stay in order: log sigma falls from the first to the last by shares.

    log sigma_i = log sigma_0 - (log sigma_0 - log sigma_N) (s_1 + ... + s_i),   s = softmax(shares)
    """

    def __init__(self, sigmas: Tensor):
        super().__init__()
        logs = sigmas.double().log()
        self.first, self.span = logs[0].item(), (logs[0] - logs[-1]).item()
        self.shares = nn.Parameter((-logs.diff() / self.span).log().float())

    def forward(self) -> Tensor:
        """(N + 1,) float64."""
        fallen = self.shares.double().softmax(0).cumsum(0)
        return (self.first - self.span * torch.cat([fallen.new_zeros(1), fallen])).exp()


class Trainer:
    """A predictor in training, `length` rounds of it, and with learn_sigmas the noise levels between the first and last.

    Everything that changes from round to round is in `predictor`, `levels`, `optimizer`, the data's generator, `rounds`,
    `skipped` and `history`.
    """

    def __init__(
        self,
        predictor: AMEDPredictor,
        teacher: Teacher,
        data: Batches,
        loss: Loss,
        ranks: Ranks,
        *,
        lr: float,
        length: int,
        learn_sigmas: bool = False,
    ):
        if not callable(loss):
            raise ConfigError(f"loss must be a function (x, target) -> (B,), got {loss!r}")
        self.predictor, self.teacher, self.data, self.loss, self.ranks = predictor, teacher, data, loss, ranks
        plan, device = data.plan, data.model.device
        self.watched = Watched(predictor, plan.intervals, device)
        self.program = plan.program(self.watched).on(device, torch.float32)
        self.levels = LearnedLevels(plan.levels).to(device) if learn_sigmas else None
        self.named = dict(predictor.named_parameters())
        if self.levels is not None:
            self.named |= {f"levels.{name}": parameter for name, parameter in self.levels.named_parameters()}
        self.parameters = list(self.named.values())
        self.lr, self.length = lr, length
        # A run has some hundred steps: the usual 0.999 would remember the steep first ones to its end.
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, betas=(0.9, 0.95))
        self.rounds = self.skipped = self.bad = 0
        self.history: list[Round] = []

    def current(self) -> Program:
        """The student's program on the noise levels of now; on a graph of its own each time, where they are learned."""
        if self.levels is None:
            return self.program
        return replace(self.program, sigmas=self.levels().to(self.program.sigmas))

    @property
    def plan(self) -> Plan:
        """The student's, with what was learned in it."""
        plan = self.data.plan
        return plan if self.levels is None else plan.through(self.levels().tolist()[1:-1])

    def round(self, parts: list[slice], end_to_end: bool) -> Round:
        """Train on one batch, a backward pass per part. Raises NonFiniteError after three bad steps in a row.

        The learning rate falls to zero over the second half: r of the last interval matters too much to leave it noisy.
        """
        self.watched.sums.zero_()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, 2 * (1 - self.rounds / self.length))
        runs = [StudentRun(self, denoiser, x, end_to_end) for denoiser, x in self.data.draw(parts)]
        if end_to_end:
            losses = [self._descend(run.to_the_end() for run in runs)]
        else:
            losses = [self._descend(run.interval(i) for run in runs) for i in range(self.program.intervals)]
        self.rounds += 1
        midpoints = (self.ranks.total(self.watched.sums) / self.data.batch).tolist()
        seen = Round(self.rounds * self.data.batch, losses, [tuple(row) for row in midpoints], self.skipped)
        self.history.append(seen)
        return seen

    def _descend(self, losses: Iterable[Tensor]) -> float:
        """One step down the sum of losses, over parts and ranks; none where it or its gradient is not finite.

        The ranks exchange one vector, so that all of them see the same numbers and decide alike.
        """
        total = None
        for loss in losses:
            # autograd.grad reaches the predictor only: nothing accumulates in the denoiser.
            grads = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            vector = torch.cat([loss.detach().reshape(1), *(grad.flatten() for grad in grads)])
            total = vector if total is None else total + vector
        total = self.ranks.total(total)  # type: ignore[arg-type]
        if bool(torch.isfinite(total).all()):
            # Downhill on log(loss): the first interval's loss starts a hundred times above the others', and Adam, whose
            # memory is longer than the run, would follow it alone and leave theirs where sigmoids are flat. A loss far
            # below the largest is as good as none: without the floor it would pull ever harder as it vanishes.
            self._step(total[1:] / (total[0] + self._floor()).clamp_min(torch.finfo(total.dtype).tiny))
            self.bad = 0
        else:
            self.skipped, self.bad = self.skipped + 1, self.bad + 1
        if self.bad == MAX_SKIPPED:
            raise NonFiniteError(f"loss or gradient was NaN or infinite {MAX_SKIPPED} times in a row", self.rounds, [])
        return total[0].item()

    def _floor(self) -> float:
        """A hundredth of the last round's largest loss."""
        losses = self.history[-1].losses if self.history else []
        return 0.01 * max(filter(math.isfinite, losses), default=0.0)

    def _step(self, gradient: Tensor) -> None:
        pieces = gradient.split([p.numel() for p in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
        with plain_defaults():  # Adam counts its steps in new tensors
            self.optimizer.step()


class StudentRun:
    """The student under way on one part of a batch."""

    def __init__(self, trainer: Trainer, denoiser: Denoiser, x: Tensor, end_to_end: bool):
        self.trainer, self.targets = trainer, trainer.teacher.states(denoiser, x)
        # A whole trajectory's activations would not fit; those of one evaluation at a time do.
        mean = mean_answer(trainer.data.plan.mean, denoiser)
        self.trajectory = Trajectory(trainer.current(), recomputed(denoiser) if end_to_end else denoiser, mean)
        self.state = State(x)

    def interval(self, i: int) -> Tensor:
        """This part's share of the loss at the end of interval i; the way there is cut off from the next one.

        Single-step solvers start from the teacher's state, multistep ones from their own, whose history they need.
        """
        if not self.trainer.program.solver.memory:
            self.state = State(self.targets[i])
        self._advance(i)
        loss = self._loss(self.targets[i + 1])
        self.state = self.state.detach()
        self.trajectory.walk.detach()
        return loss

    def to_the_end(self) -> Tensor:
        """This part's share of the loss of the final sample."""
        for i in range(self.trainer.program.intervals):
            self._advance(i)
        return self._loss(self.targets[-1])

    def _advance(self, i: int) -> None:
        self.trainer.watched.i = i
        self.state = self.trajectory.interval(self.state, i)[-1]

    def _loss(self, target: Tensor) -> Tensor:
        losses = self.trainer.loss(self.state.y[0].clone(), target.clone())  # the caller's, which may write to them
        if not isinstance(losses, Tensor) or losses.shape != target.shape[:1]:
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigError(f"loss must return one number per sample, shape ({len(target)},), got {got}")
        return losses.sum() / self.trainer.data.batch


def recomputed(denoiser: Denoiser) -> Denoiser:
    """The denoiser, its activations computed again in the backward pass. Chen et al. 2016 (arXiv:1604.06174)."""

    def denoise(x: Tensor, sigma: Tensor) -> Denoised:
        # An evaluation-mode network draws no random numbers that would have to be kept.
        return as_denoised(checkpoint(denoiser, x, sigma, use_reentrant=False, preserve_rng_state=False))  # type: ignore[arg-type]

    return denoise
