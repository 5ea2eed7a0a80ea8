"""ComfyUI's flow models, whose state is (1 - t) x0 + t noise, for solvers of the state x0 + sigma noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.errors import ConfigError, require

INSIDE = "the nodes run inside ComfyUI; put them into its custom_nodes folder"
_WITHOUT_FLOAT64 = ("mps", "privateuseone")


class Flow(NamedTuple):
    """The state x_t = (1 - t) x0 + t s noise of a flow model, s its noise_scale, read as x = x_t / (1 - t):

        x = x0 + sigma noise,   sigma = s t / (1 - t),   t = sigma / (s + sigma)

    Near t = 1 float32 has few digits of 1 - t left: sigma and t are computed in float64 wherever a device has it.
    """

    noise_scale: float = 1.0

    def sigma(self, t: Tensor) -> Tensor:
        """float64 on the CPU."""
        t = t.cpu().double()
        return self.noise_scale * t / (1 - t)

    def time(self, sigma: Tensor) -> Tensor:
        sigma = _wide(sigma)
        return sigma / (self.noise_scale + sigma)

    def rest(self, sigma: Tensor) -> Tensor:
        """1 - t"""
        return self.noise_scale / (self.noise_scale + _wide(sigma))


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type in _WITHOUT_FLOAT64 else x.double()


def flow_of(sampling: Any) -> Flow | None:
    """How the state of a model with this `model_sampling` flows, None where it is x0 + sigma noise.

    Raises ConfigError for models that start from anything but noise.
    """
    const = require("comfy.model_sampling", INSIDE).CONST
    if not isinstance(sampling, const):
        return None
    if type(sampling).noise_scaling is not const.noise_scaling:
        raise ConfigError(
            f"this model does not start from noise ({type(sampling).__mro__[1].__name__}): no AMED for it; use another sampler"
        )
    return Flow(float(getattr(sampling, "noise_scale", 1.0)))


def flow_times(t: Tensor, sampling: Any) -> Tensor:
    """SIGMAS of a flow model as they are worked off: a first t of 1, where sigma has no end, becomes the next below.

    As in ComfyUI's own samplers that need one, that of the first 0.01 % of the way. Raises ConfigError for levels above 1.
    """
    if bool((t > 1).any()):
        raise ConfigError(
            f"a flow model's noise levels lie below 1, got {float(t.max()):g}; connect AMED Schedule with this MODEL"
        )
    t = t.cpu().double()
    if float(t[0]) == 1:
        t = torch.cat([t.new_tensor([float(sampling.percent_to_sigma(1e-4))]), t[1:]])
    return t
