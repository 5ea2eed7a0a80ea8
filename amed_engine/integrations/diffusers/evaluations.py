"""A program whose midpoints are constants, flat: what a scheduler walks through, one call of the network at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from amed_engine.solvers.program import Program
from amed_engine.solvers.stage import Update


@dataclass
class AMEDSchedulerOutput(BaseOutput):
    """prev_sample: where to evaluate next, or the result; pred_original_sample: D of this evaluation. (B, C, H, W)"""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Evaluation(NamedTuple):
    """The noise level told to the network, and what follows; None where D itself is the result."""

    sigma: Tensor
    update: Update | None


def evaluations(program: Program) -> list[Evaluation]:
    """A static program as a list, evaluation by evaluation."""
    assert program.updates is not None
    found = []
    for i, updates in enumerate(program.updates):
        told = program.sigmas[i]
        for update in updates:
            found.append(Evaluation(told.reshape(()), update))
            told = program.sigmas[i + 1] if update.sigma_net is None else update.sigma_net[0]
    return found + ([Evaluation(program.sigmas[-1], None)] if program.denoise_to_zero else [])
