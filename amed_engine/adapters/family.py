"""A family of networks is four functions of the noise level: D = skip·x + out·F(scale·x; time).

F is the raw network, x = x0 + sigma·n the state of the sampler. Each family is a module (x and sigma stay the sampler's), so
that its tables follow the network to its device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from amed_engine.adapters.fingerprint import Settled
from amed_engine.errors import ConfigError


class Coefficients(NamedTuple):
    """skip, out, scale (B,) in D = skip·x + out·F(scale·x; time); time (B,) is what the network is told."""

    skip: Tensor
    out: Tensor
    scale: Tensor
    time: Tensor


class Family(Settled):
    """sigma (B,) -> Coefficients, with the range of noise levels that the network knows."""

    name = ""
    sigma_min: float
    sigma_max: float
    consistency = (
        False  # whether D is a sample at sigma_min, the end of the ODE through x, and not the mean of the data
    )

    def whole(self, time: Tensor) -> Tensor:
        """The time (B,) of a network that is told whole numbers alone. Raises ConfigError where it is no count of steps."""
        raise ConfigError(
            f"the network is told whole numbers (int64), and prediction={self.name!r} has no steps to round to "
            f"({self.describe()}); pass the prediction that it was trained for, or export it with a time in floating point"
        )

    def describe(self) -> str:
        """One line for people: what is predicted, and what the network is told."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What tells it from others of its class, JSON-able: a predictor is for one of them. The range does not count."""
        return {}


def spread(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to multiply a tensor (B, ...)."""
    return coefficient.reshape(-1, *[1] * (like.dim() - 1))
