"""What goes into a scheduler's step, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from amed_engine.errors import ConfigError


@dataclass
class AMEDSchedulerOutput(BaseOutput):
    """prev_sample: where to evaluate next, or the result; pred_original_sample: D of this evaluation. (B, C, H, W)"""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def check_output(output: Tensor, sample: Tensor) -> None:
    """Raise ConfigError for an output of another shape, which arithmetic might broadcast."""
    if output.shape != sample.shape:
        raise ConfigError(
            f"model_output must have the shape of sample {tuple(sample.shape)}, got {tuple(output.shape)}"
        )
