"""k-diffusion: AMED among its samplers, called as they are. Needs nothing of the package itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from amed_engine.adapters.taps import Bottleneck, Tap
from amed_engine.integrations.common import AnyPredictor, Recorder, make_program
from amed_engine.sampling.denoiser import as_denoised, copied
from amed_engine.sampling.loop import State, Trajectory, evaluate
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.program import Program


@torch.no_grad()
def sample_amed(
    model: Callable[..., Any],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    predictor: AnyPredictor,
    bottleneck: Bottleneck | None = None,
    afs: FirstStep = False,
    mean: Tensor | None = None,
) -> Tensor:
    """AMED-Solver, or the solver of the predictor's plan, as a k-diffusion sampler (arXiv:2312.00094).

    model: (x, sigma (B,), **extra_args) -> D; its second evaluation of a step gets another level per sample. x: (B, ...),
    noise already scaled by sigmas[0]. sigmas: (N + 1,) decreasing; a 0 at the end is dropped. callback: called once per
    step with x, i, sigma, sigma_hat and denoised, the state and D at the start of the step. disable: of the progress bar.
    predictor: an AMEDPredictor, a path to one, or one Midpoint per step. bottleneck: what the predictor reads, as the
    dotted name of a submodule of the model, a module, or a function that returns the latest features (B, C, h, w); without
    one it gets what the model returns as (D, features), or none. afs: the first evaluation is analytic, for data about zero
    (True) or about a mean answer of the model ("mean"): `mean` (1 or B, ...), None for the one in the predictor's plan.
    Returns x at the last noise level. Raises ConfigError.
    """
    program = make_program(predictor, sigmas, afs, x, mean)
    return run(program, model, x, extra_args, callback, disable, bottleneck)


def run(
    program: Program,
    model: Callable[..., Any],
    x: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    bottleneck: Bottleneck | None = None,
) -> Tensor:
    """A program from x at its first noise level; the other arguments are those of `sample_amed`."""
    options = dict(extra_args or {})
    with Tap(model, bottleneck) as tap:

        def told(y: Tensor, sigma: Tensor) -> Any:  # copies: what is the host's is not for its model to write to
            return model(y, sigma, **{name: copied(value) for name, value in options.items()})

        recorder = Recorder(tap.denoiser(told))
        trajectory, state = Trajectory(program, recorder, program.mean), State(x)
        for i in trange(program.intervals, disable=disable):
            analytic = program.afs and not i
            recorder.first = as_denoised(trajectory.first(x, program.sigmas[0].expand(len(x)))) if analytic else None
            before, state = state.y[0], trajectory.interval(state, i)[-1]
            if callback is not None and recorder.first is not None:
                sigma = program.sigmas[i]
                # Copies of what the trajectory goes on with, the caller's x among them: hosts write to what they get.
                seen = {"x": before.clone(), "denoised": recorder.first.x0.clone()}
                callback({**seen, "i": i, "sigma": sigma, "sigma_hat": sigma})
        if program.denoise_to_zero:
            return evaluate(recorder, state.y, (program.sigmas[-1],))[0].x0
        return state.y[0]
