"""A program: a solver on noise levels with what its predictor says, folded into one matrix per evaluation where it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.solvers import USE_WITH_PREDICTOR
from amed_engine.solvers.base import Solver, check_first_step_of, count_evaluations
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.schedule import check_sigmas
from amed_engine.solvers.stage import Choice, Layout, Stage, Update, fold, levels, map_choice, retained, stack, trimmed

Choose = Callable[[Tensor | None, Tensor, Tensor], Choice]

PredictorLike = Choose | Sequence[Choice] | Sequence[Choose]


@dataclass(frozen=True)
class Program:
    """Everything that is fixed before an image is seen: solver, noise levels, and the updates where nothing is learned.

    A predictor is a function (features, sigma, sigma_next) -> Midpoint (or Row, for the solver "nonstationary"), or a
    sequence of functions or of their answers, one per interval. Answers that are numbers are folded into the updates too.
    mean: what an analytic first step "mean" starts about, rows (R, ...) as `Mean` has them; None for other first steps.
    """

    solver: Solver
    sigmas: Tensor  # (n + 1,) float64 on the host, or on `device` in the state's precision after `on`
    predictor: PredictorLike | None = None
    afs: FirstStep = False
    denoise_to_zero: bool = False
    mean: Tensor | None = None
    updates: tuple[tuple[Update, ...], ...] | None = None

    @classmethod
    def build(
        cls,
        solver: Solver,
        sigmas: Tensor,
        predictor: PredictorLike | None = None,
        *,
        afs: FirstStep = False,
        denoise_to_zero: bool = False,
        mean: Tensor | None = None,
    ) -> Program:
        program = cls(solver, check_sigmas(sigmas), predictor, afs, denoise_to_zero, mean)
        program._check_predictor()
        program._check_mean()
        check_first_step_of(solver, afs)
        return replace(program, updates=program._fold_all()) if program._is_static() else program

    @property
    def intervals(self) -> int:
        return len(self.sigmas) - 1

    @property
    def nfe(self) -> int:
        """Network evaluations per sample (parallel points count one each)."""
        evaluations = count_evaluations(self.solver, self.intervals, midpoint=self.predictor is not None, afs=self.afs)
        return evaluations + int(self.denoise_to_zero)

    @property
    def noises(self) -> int:
        """Fresh noises that a sample needs beside its latent."""
        return self.solver.noises(self.intervals)

    def on(self, device: torch.device, dtype: torch.dtype) -> Program:
        """The same program with its constants on a device; low-precision states keep float32 coefficients."""
        precision = torch.promote_types(dtype, torch.float32)
        updates = self.updates and tuple(tuple(u.to(device, precision) for u in step) for step in self.updates)
        mean = None if self.mean is None else self.mean.to(device, precision)
        return replace(self, sigmas=self.sigmas.to(device, precision), mean=mean, updates=updates)

    def evaluations(self, updates: Iterable[Sequence[Update]] | None = None) -> Iterator[Call]:
        """Its calls in order, an analytic first one included, for hosts that run a program by themselves.

        updates: per interval, in place of its own, where a predictor has yet to say them.
        """
        own = self.updates if updates is None else updates
        assert own is not None
        for i, step in enumerate(own):
            sigma = told = (self.sigmas[i],)
            for s, update in enumerate(step):
                yield Call(i, s, sigma, told, update)
                sigma, told = update.sigma or (), update.sigma_net or ()
        if self.denoise_to_zero:
            yield Call(self.intervals, 0, (self.sigmas[-1],), (self.sigmas[-1],), None)

    def frozen(self, features: Tensor | None = None) -> Program:
        """The program with what its predictor says to `features` in place of the predictor, as numbers on the host."""
        if self.updates is not None:
            return self
        said = self.predictor
        if not isinstance(said, Sequence):
            parameters = getattr(said, "parameters", tuple)()
            levels = self.sigmas.double().to(next((p.device for p in parameters), "cpu")).unsqueeze(1)
            with torch.no_grad():
                said = [said(features, levels[i], levels[i + 1]) for i in range(self.intervals)]  # type: ignore[misc]
        numbers = [map_choice(lambda c: c.squeeze(), _on_host(choice)) for choice in said]  # type: ignore[arg-type, union-attr]
        options = {"afs": self.afs, "mean": self.mean, "denoise_to_zero": self.denoise_to_zero}
        return Program.build(self.solver, self.sigmas.double().cpu(), numbers, **options)

    def _check_predictor(self) -> None:
        takes, name = self.solver.takes_predictor, type(self.solver).__name__
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

    def _check_mean(self) -> None:
        if (self.afs == "mean") is (self.mean is None):
            raise ConfigError(
                f"afs={self.afs!r} and mean={'None' if self.mean is None else 'a tensor'}: a mean answer goes with "
                'afs="mean" and with no other; see amed_engine.measure_mean'
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
    return map_choice(lambda c: torch.as_tensor(c, dtype=torch.float64, device="cpu").detach(), choice)


class Call(NamedTuple):
    """One call of the network on its way through a program: the place s of an evaluation in interval i, the noise level of each
    point, the one told to the network, and what follows; None where D itself is the result."""

    i: int
    s: int
    sigma: tuple[Tensor, ...]
    sigma_net: tuple[Tensor, ...]
    update: Update | None


class Walk:
    """Asks the solver for its stages along a trajectory and folds them, carrying noise levels and layout only."""

    def __init__(self, program: Program, sigmas: Any, stack: Callable[..., Any] = stack):
        self.solver, self.sigmas, self.stack = program.solver.over(sigmas), sigmas, stack
        self.intervals = len(sigmas) - 1
        self.past: tuple[Tensor, ...] = ()
        self.directions, self.y_is_x = self.solver.noises(self.intervals), True

    def updates(self, i: int, choice: Choice | None) -> tuple[Update, ...]:
        if choice is not None and not isinstance(choice, self.solver.answer):
            name = type(self.solver).__name__
            raise ConfigError(
                f"solver {name} needs a {self.solver.answer.__name__} for every interval, got {type(choice).__name__}; "
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
        update = fold(stage, layout, keep, self.stack)
        self.directions, self.y_is_x = update.keep, update.x_is_y
        return update
