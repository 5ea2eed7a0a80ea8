"""A predictor of numbers that were written into a node."""

from __future__ import annotations

import math
from typing import Any

from amed_engine.errors import ConfigError
from amed_engine.integrations.comfyui.training_free import plan_on
from amed_engine.sampling.predictors import ConstantPredictor
from amed_engine.sampling.predictors.coefficient import MAX_INTERVALS
from amed_engine.solvers import make_solver
from amed_engine.solvers.stage import Midpoint

DEFAULT_TEXT = "0.5 1 1\n0.5 1 1"
_LINE = "write r, scale_dir and scale_time for one step, such as 0.5 1 1"


def constants(model: Any, constants: str, solver: str, schedule: str, afs: str, cfg: float) -> tuple[ConstantPredictor]:
    """A ConstantPredictor, for the noise levels of this model's range, a step for each line of `constants`."""
    midpoints = read(constants)
    nfe = len(midpoints) * make_solver(solver).evaluations(True) - (afs == "on")
    sampling = model.get_model_object("model_sampling")
    predictor = ConstantPredictor.of(midpoints)
    predictor.plan = plan_on(
        sampling, nfe, solver, schedule, afs, midpoint=True, guidance_scale=None if math.isclose(cfg, 1) else float(cfg)
    )
    return (predictor,)


def read(text: str) -> list[Midpoint]:
    """One Midpoint per line; commas count as blanks, # starts a remark. Raises ConfigError that names the line."""
    lines = [(i, line.split("#")[0].replace(",", " ").split()) for i, line in enumerate(text.splitlines(), 1)]
    midpoints = [_midpoint(i, words) for i, words in lines if words]
    if not midpoints:
        raise ConfigError(f"constants has no line; {_LINE}, a line for each")
    if len(midpoints) > MAX_INTERVALS:
        raise ConfigError(f"constants has {len(midpoints)} lines, expected up to {MAX_INTERVALS}, one for each step")
    return midpoints


def _midpoint(i: int, words: list[str]) -> Midpoint:
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise ConfigError(f"line {i} of constants is {' '.join(words)!r}, which holds no number; {_LINE}") from error
    if len(numbers) > 3 or not all(0 < number < math.inf for number in numbers):
        raise ConfigError(f"line {i} of constants is {' '.join(words)!r}, expected up to 3 positive numbers; {_LINE}")
    if numbers[0] >= 1:
        raise ConfigError(f"line {i} of constants has r = {numbers[0]:g}, which lies between 0 and 1; {_LINE}")
    return Midpoint(*numbers)
