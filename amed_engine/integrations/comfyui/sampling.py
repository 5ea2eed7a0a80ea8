"""A sampler function as ComfyUI's KSAMPLER calls it, for whatever model it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from amed_engine.adapters.taps import Bottleneck
from amed_engine.errors import ConfigError
from amed_engine.integrations.comfyui.flow import Flow, flow_of, flow_times
from amed_engine.integrations.comfyui.host import check_interrupted
from amed_engine.integrations.k_diffusion import run
from amed_engine.solvers.base import Solver
from amed_engine.solvers.program import Program

Callback = Callable[[dict[str, Any]], object] | None


class Recipe(Protocol):
    """What `draw` runs."""

    bottleneck: Bottleneck | None

    def program(self, levels: Tensor, like: Tensor) -> Program:
        """The program for samples like this on the host's noise levels (N + 1,) float64, a 0 at their end included."""
        ...


class TrainingFree:
    """A solver on the host's noise levels; from a last level to 0 goes one evaluation, whose D is the result."""

    bottleneck: Bottleneck | None = None

    def __init__(self, solver: Solver):
        self.solver = solver

    def program(self, levels: Tensor, like: Tensor) -> Program:
        zero = float(levels[-1]) == 0
        made = Program.build(self.solver, levels[:-1] if zero else levels, denoise_to_zero=zero)
        return made.on(like.device, like.dtype)


@torch.no_grad()
def draw(
    model: Callable[..., Any],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback = None,
    disable: bool | None = None,
    *,
    recipe: Recipe,
) -> Tensor:
    """The state at the last of `sigmas`, x, sigmas and callback being those of the model that samples.

        flow models:  D(y; sigma) = model((1 - t) y, t),   y = x / (1 - t)

    model: KSamplerX0Inpaint, whose inner_model is the guider and whose inner_model.inner_model the model itself: what kind it
    is, is seen now, since a node after ours may have changed it. Cancel is looked for before every evaluation.
    """
    sampling = model.inner_model.inner_model.model_sampling  # type: ignore[attr-defined]
    flow = flow_of(sampling)
    levels = sigmas.cpu().double() if flow is None else flow.sigma(flow_times(sigmas, sampling))
    coordinates, levels = _Coordinates(model, flow, callback), falling(levels)
    if len(levels) < 2:
        return x
    zero = float(levels[-1]) == 0
    if len(levels) == 2 and zero:  # no solver has steps from there: D is the result
        return coordinates.only(x, levels[0], dict(extra_args or {}))
    program = recipe.program(levels, x)
    y = coordinates.into(x, program.sigmas[0])
    tell = callback and coordinates.tell
    drawn = run(program, coordinates, y, extra_args, tell, disable, recipe.bottleneck)
    if zero and program.denoise_to_zero:
        coordinates.tell_last(program.intervals, drawn, tell)
    return drawn if zero else coordinates.out_of(drawn, program.sigmas[-1])  # at level 0 x and y are one


def falling(levels: Tensor) -> Tensor:
    """The levels less those that repeat the one before. Raises ConfigError where one rises."""
    levels = torch.unique_consecutive(levels)
    if bool((levels.diff() > 0).any()):
        rises = int((levels.diff() > 0).nonzero()[0])
        raise ConfigError(
            f"SIGMAS must fall from step to step, got {levels[rises]:g} before {levels[rises + 1]:g}; connect those of a "
            "scheduler, without Flip Sigmas"
        )
    return levels


class _Coordinates:
    """The model as (y, sigma) -> D of y = x0 + sigma noise; remembers its last question."""

    def __init__(self, model: Callable[..., Any], flow: Flow | None, callback: Callback):
        self.model, self.flow, self.callback = model, flow, callback
        self.asked: tuple[Tensor, Tensor] | None = None

    def __call__(self, y: Tensor, sigma: Tensor, **told: Any) -> Any:
        check_interrupted()
        self.asked = y, sigma
        return self.model(self.out_of(y, sigma), self.time(sigma), **told)

    def only(self, x: Tensor, sigma: Tensor, told: dict[str, Any]) -> Tensor:
        check_interrupted()
        level = self.time(sigma.to(x.device, torch.promote_types(x.dtype, torch.float32)))
        drawn = self.model(x, level.expand(len(x)), **told)
        if self.callback is not None:
            self.callback({"x": x.clone(), "denoised": drawn.clone(), "i": 0, "sigma": level, "sigma_hat": level})
        return drawn

    def time(self, sigma: Tensor) -> Tensor:
        return sigma if self.flow is None else self.flow.time(sigma).to(sigma.dtype)

    def out_of(self, y: Tensor, sigma: Tensor) -> Tensor:
        """x of y."""
        return y if self.flow is None else y * self._rest(sigma, y)

    def into(self, x: Tensor, sigma: Tensor) -> Tensor:
        """y of x."""
        return x if self.flow is None else x / self._rest(sigma, x)

    def _rest(self, sigma: Tensor, like: Tensor) -> Tensor:
        assert self.flow is not None
        return self.flow.rest(sigma).to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))

    def tell(self, step: dict[str, Any]) -> None:
        assert self.callback is not None
        t = self.time(step["sigma"])
        self.callback({**step, "x": self.out_of(step["x"], step["sigma"]), "sigma": t, "sigma_hat": t})

    def tell_last(self, i: int, denoised: Tensor, tell: Callback) -> None:
        """The evaluation at the last level above 0 is the host's last step."""
        if tell is not None and self.asked is not None:
            y, sigma = self.asked
            tell({"x": y.clone(), "denoised": denoised.clone(), "i": i, "sigma": sigma[0], "sigma_hat": sigma[0]})
