"""What the student learns from: the teacher's states, and a distance to them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amed_engine.engine.graphs import GraphCache, graph_key
from amed_engine.errors import AmedError, ConfigError
from amed_engine.sampling.denoiser import Denoiser
from amed_engine.sampling.loop import integrate
from amed_engine.solvers import integrator_names
from amed_engine.solvers.plan import Plan, make_plan
from amed_engine.solvers.program import Program
from amed_engine.solvers.schedule import make_schedule
from amed_engine.training.batches import BoundDenoiser

logger = logging.getLogger("amed_engine")


@dataclass
class Teacher:
    """A training-free solver on a refinement of the student's noise levels.

    cache: of graphs of the whole trajectory, for denoisers that are the model's own; None runs eagerly.
    """

    plan: Plan
    stride: int
    cache: GraphCache | None = None

    @classmethod
    def of(
        cls,
        student: Plan,
        solver: str,
        options: Mapping[str, Any] | None,
        intermediate: int,
        schedule: str | None = None,
        rho: float | None = None,
        alphas_cumprod: Tensor | None = None,
    ) -> Teacher:
        """`intermediate` more levels inside each of the student's intervals, spaced as the student's schedule spaces
        them; another schedule's fine levels are taken at the student's, so that its states are where they are needed.
        alphas_cumprod: of the network, for "discrete"."""
        if not isinstance(intermediate, int) or intermediate < 0:
            raise ConfigError(f"teacher_intermediate must be an integer that is not negative, got {intermediate}")
        stride = intermediate + 1
        levels = (
            _refined(student, stride, alphas_cumprod)
            if schedule is None
            else _inside(student, stride, schedule, rho, alphas_cumprod)
        )
        plan = make_plan(None, solver=solver, options=options, schedule=levels, afs=False)
        if plan.midpoint or not plan.make_solver().integrates:
            reason = "needs a predictor itself" if plan.midpoint else "adds fresh noise and has no solution to teach"
            free = integrator_names("none", "optional")
            raise ConfigError(f"teacher {solver!r} {reason}; use heun, or one of {', '.join(free)}")
        return cls(plan, stride)

    def states(self, denoiser: Denoiser, x: Tensor) -> Tensor:
        """The teacher's states at the student's noise levels, (intervals + 1, B, ...)."""
        program = self.plan.program().on(x.device, x.dtype)
        with torch.no_grad():
            states = self._captured(Course(program, self.stride, denoiser), x)
        return states.transpose(0, 1).contiguous()

    def _captured(self, course: Course, x: Tensor) -> Tensor:
        """The course by graph where one may be; a denoiser with its own conditions has no input for others."""
        bound = course.denoiser
        if self.cache is None or not isinstance(bound, BoundDenoiser):
            return course(x)
        key = graph_key(bound.guidance_scale, x, bound.labels, bound.model.module)
        try:
            states = self.cache.run(key, course, x, bound.labels)
        except (AmedError, torch.OutOfMemoryError) as error:
            logger.warning("the teacher runs eagerly from here on, as its trajectories cannot be captured: %s", error)
            self.cache.clear()
            self.cache = states = None
        return course(x) if states is None else states


@dataclass(frozen=True)
class Course:
    """(x, labels) -> the states (B, intervals / stride + 1, ...): samples first, as graphs pad and split them."""

    program: Program
    stride: int
    denoiser: Denoiser

    def __call__(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        denoiser = self.denoiser if labels is None else replace(self.denoiser, labels=labels)  # type: ignore[type-var]
        return torch.stack(integrate(self.program, denoiser, x)[:: self.stride], dim=1)


def _refined(student: Plan, stride: int, alphas_cumprod: Tensor | None) -> Tensor:
    count = student.intervals * stride + 1
    ends = student.sigmas[-1], student.sigmas[0]
    levels = make_schedule(student.schedule, count, *ends, student.rho, alphas_cumprod)
    if not torch.allclose(levels[::stride], student.levels, rtol=1e-6):
        raise ConfigError(f"schedule {student.schedule!r} does not refine: its levels move with their number")
    return levels


def _inside(student: Plan, stride: int, schedule: str, rho: float | None, alphas_cumprod: Tensor | None) -> Tensor:
    """Every interval of the student, cut by the named schedule between its ends."""
    parts = [
        make_schedule(schedule, stride + 1, low, high, rho, alphas_cumprod)[:-1]
        if stride > 1
        else student.levels[:1].new_tensor([high])
        for high, low in itertools.pairwise(student.sigmas)
    ]
    return torch.cat([*parts, student.levels[-1:]])


Loss = Callable[[Tensor, Tensor], Tensor]


def squared_error(x: Tensor, target: Tensor) -> Tensor:
    """|x - target|² per sample, (B,)."""
    return (x - target).square().flatten(1).sum(1)
