"""Where a scheduler with an analytic first step starts: at its result, since a pipeline only evaluates the network."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.integrations.common import check_start
from amed_engine.sampling.denoiser import analytic_first_step
from amed_engine.sampling.loop import State, advance
from amed_engine.solvers.mean import Mean
from amed_engine.solvers.program import Call, Program


class Start:
    """The analytic first step of a program without thresholding: from x to stretch·x + shift·m, m the mean it is about.

    A pipeline multiplies its first latents by one number, which covers the stretch; `shifted` adds the rest.
    """

    def __init__(self, program: Program):
        self.program = program

    @cached_property
    def stretch(self) -> float:
        return self._leads(1.0, 0.0)

    @cached_property
    def shift(self) -> float:
        return self._leads(0.0, 1.0)

    def shifted(self, sample: Tensor) -> Tensor:
        """The state after the step, of a pipeline's first latents stretch·x (B, ...). Raises ConfigError for another shape."""
        if self.program.mean is None:
            return sample
        check_start(self.program.mean, sample)
        y = sample.to(torch.promote_types(sample.dtype, torch.float32))
        return (y + self.shift * self.program.mean.to(y)).to(sample.dtype)

    def state_at(self, y: Tensor) -> State:
        """The state after the step that leads to y, its directions included."""
        mean = None if self.program.mean is None else self.program.mean.to(y)
        x = (y if mean is None else y - self.shift * mean) / self.stretch
        return self._state(x, mean).at(y)

    def _leads(self, x: float, mean: float) -> float:
        told = torch.tensor([[x], [mean]], dtype=torch.float64, device="cpu")
        return self._state(told[:1], told[1:]).y[0].item()

    def _state(self, x: Tensor, mean: Tensor | None) -> State:
        update = self.program.updates[0][0].to(x.device, x.dtype)  # type: ignore[index]
        sigma = self.program.sigmas[:1].to(x.device, x.dtype)
        return advance(State(x), (analytic_first_step(x, sigma, mean).x0,), update)


def check_level(mean: Mean | None, levels: Tensor) -> None:
    """A ConfigError where a mean answer was measured at another noise level than these start from."""
    if mean is not None and not mean.is_for(float(levels[0]), None, None):
        raise ConfigError(
            f"the mean answer was measured at sigma {mean.sigma:g}, these noise levels start from {float(levels[0]):g}; pass "
            "noise_levels that start there"
        )


def evaluations_from(program: Program, evaluations: list[Call], index: int, levels: Tensor) -> list[Call]:
    """The evaluations of a trajectory that starts at this index of them, without a history. Raises ConfigError."""
    interval, inside = divmod(index + int(bool(program.afs)), 2)
    if inside:
        raise ConfigError(
            f"a trajectory can only start where an interval does; got index {index} of {len(evaluations)}"
            f"{'; set afs=False: image-to-image has no analytic first step' if program.afs else ''}"
        )
    rest = levels[interval:]
    if len(rest) == 1:
        return evaluations[index:]
    fixed = program.predictor[interval:]  # type: ignore[index]
    return list(Program.build(program.solver, rest, fixed, denoise_to_zero=program.denoise_to_zero).evaluations())
