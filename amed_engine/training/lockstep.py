"""Many training-free programs on the same latents, evaluation by evaluation: what several would ask the network is asked once.

All that start with an evaluation share it, and multistep solvers on the same levels their second one too: before there is a
history, every one of them takes Euler's step.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amed_engine.sampling.denoiser import Denoiser, analytic_first_step, as_denoised
from amed_engine.sampling.loop import State, advance
from amed_engine.solvers.program import Program
from amed_engine.training.batches import BoundDenoiser
from amed_engine.training.gauss_newton import Example

SAME = (
    1e-5  # of sigma: points this near have one answer, far above the rounding of float32 and below what moves a sample
)


class Point(NamedTuple):
    """Where a program wants an answer: y (B, ...) at the noise level sigma."""

    y: Tensor
    sigma: float

    def is_near(self, other: Point) -> bool:
        level = math.isclose(self.sigma, other.sigma, rel_tol=1e-6)
        return level and bool((self.y - other.y).abs().max() <= SAME * self.sigma)


@torch.no_grad()
def together(programs: Sequence[Program], example: Example, rows: int) -> tuple[list[Tensor], int]:
    """Where each program ends, (B, ...), and how many evaluations they spent, a row each. rows: of one network call, about."""
    courses = [_course(program, example) for program in programs]
    ends: dict[int, Tensor] = {}
    asked, spent = {k: next(course) for k, course in enumerate(courses)}, 0
    while asked:
        points, place = _distinct(asked)
        answers = _answers(points, example.denoiser, max(1, rows // len(example.x)))
        spent += len(points) * len(example.x)
        for k in list(asked):
            try:
                asked[k] = courses[k].send(answers[place[k]])
            except StopIteration as ended:
                ends[k] = ended.value
                del asked[k]
    return [ends[k] for k in range(len(courses))], spent


def _course(program: Program, example: Example) -> Generator[Point, Tensor, Tensor]:
    """The loop of one program turned inside out: it asks for D at a point, and returns where it ends."""
    program, x = program.on(example.x.device, example.x.dtype), example.x
    state = State(x)
    for call in program.evaluations():
        if program.afs and not (call.i or call.s):
            mean = example.mean if program.afs == "mean" else None
            answer = analytic_first_step(x, program.sigmas[0].expand(len(x)), mean).x0
        else:
            answer = yield Point(state.y[0], call.sigma_net[0].item())
        assert call.update is not None  # of a last evaluation at the end, which no training-free plan of ours has
        state = advance(state, (answer,), call.update)
    return state.y[0]


def _distinct(asked: Mapping[int, Point]) -> tuple[list[Point], dict[int, int]]:
    """The points that differ, and which of them each program wants."""
    points: list[Point] = []
    place = {}
    for k, point in asked.items():
        near = (i for i, other in enumerate(points) if point.is_near(other))
        place[k] = next(near, len(points))
        if place[k] == len(points):
            points.append(point)
    return points, place


def _answers(points: Sequence[Point], denoiser: Denoiser, at_once: int) -> list[Tensor]:
    """D at each point. A denoiser with conditions of its own bound knows its own rows alone: it has each by itself."""
    at_once = at_once if isinstance(denoiser, BoundDenoiser) else 1
    answers: list[Tensor] = []
    for start in range(0, len(points), at_once):
        part = points[start : start + at_once]
        y = torch.cat([point.y for point in part])
        sigma = torch.cat([point.y.new_full((len(point.y),), point.sigma) for point in part])
        answers += as_denoised(denoiser(y, sigma)).x0.to(y.dtype).chunk(len(part))
    return answers
