"""PhysicsNeMo: AMED as one of its solvers, whose steps have a time per sample. Needs nothing of the package itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.family import spread
from amed_engine.adapters.taps import Bottleneck, Tap
from amed_engine.errors import ConfigError
from amed_engine.integrations.common import Recorder, open_predictor
from amed_engine.sampling.loop import State, Trajectory
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.solvers import make_solver
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program
from amed_engine.solvers.stage import Midpoint


class AMEDSolver:
    """AMED-Solver as PhysicsNeMo's Solver protocol: step(x, t_cur, t_next) -> x (arXiv:2312.00094).

    denoiser: (x, t (B,)) -> the right-hand side dx/dt = (x - D) / t, as `get_denoiser(denoising_type="ode")` returns it, for
    a schedule whose time is the noise level (EDM's). predictor: an AMEDPredictor, a path to one, or one Midpoint for every
    step. bottleneck: a module, or a function that returns the latest features (B, C, h, w), as for `sample_amed`.
    A step to t_next = 0 takes the estimate D of the clean image at t_cur, as an Euler step does. Raises ConfigError.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        predictor: Any,
        bottleneck: Bottleneck | None = None,
    ):
        opened = predictor if isinstance(predictor, Midpoint) else open_predictor(predictor)
        if not isinstance(opened, (Midpoint, AMEDPredictor)):
            raise ConfigError(
                "a step is not told its number, so constants per step cannot be used; pass an AMEDPredictor or one Midpoint"
            )
        self.predictor = opened if isinstance(opened, Midpoint) else copy.deepcopy(opened).eval()
        plan: Plan | None = getattr(self.predictor, "plan", None)
        self.solver = make_solver("amed") if plan is None else plan.make_solver()
        if plan is not None and self.solver.memory:
            raise ConfigError(f"this predictor was trained for {plan.describe()}, which remembers earlier steps")
        self.denoiser, self.bottleneck = denoiser, bottleneck

    def step(self, x: Tensor, t_cur: Tensor, t_next: Tensor) -> Tensor:
        """From x (B, ...) at noise levels t_cur (B,) to t_next (B,), each decreasing for itself, by two evaluations."""
        for name, time in (("t_cur", t_cur), ("t_next", t_next)):
            if time.shape != x.shape[:1]:
                raise ConfigError(
                    f"{name} must have shape ({x.shape[0]},), one time per sample, got {tuple(time.shape)}"
                )
        # No solver evaluates at 0: such rows stay where they are, and take D instead.
        ends = t_next == 0
        levels = torch.stack([t_cur, torch.where(ends, t_cur, t_next)]).to(torch.promote_types(x.dtype, torch.float32))
        program = Program(self.solver, levels, self._midpoint(levels))
        with Tap(self.denoiser, self.bottleneck) as tap:
            recorder = Recorder(tap.denoiser(self._denoised))
            moved = Trajectory(program, recorder).interval(State(x), 0)[-1].y[0]
        assert recorder.first is not None
        return torch.where(spread(ends, x), recorder.first.x0, moved)

    def _denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D = x - t dx/dt; the host's function may write to what it is given."""
        sigma = sigma.to(x.dtype)
        return x - spread(sigma, x) * self.denoiser(x.clone(), sigma.clone())

    def _midpoint(self, levels: Tensor) -> Callable[..., Midpoint]:
        if isinstance(self.predictor, AMEDPredictor):
            return self.predictor.to(levels.device, levels.dtype)
        constant = self.predictor
        return lambda features, sigma, sigma_next: constant
