"""ComfyUI's flow models, whose state is (1 - t) x0 + t noise, for solvers of the state x0 + sigma noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.integrations.k_diffusion import sample_amed


def to_flow(sigma: Tensor) -> Tensor:
    """t = sigma / (1 + sigma)"""
    return sigma / (1 + sigma)


def sample_amed_flow(
    model: Callable[..., Any],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    **options: Any,
) -> Tensor:
    """`sample_amed`, with its options, where x, sigmas and callback are a flow model's: times t below 1 and its states x_t.

        D(x; sigma) = model(x / (1 + sigma), t),   t = sigma / (1 + sigma),   x = (1 + sigma) x_t

    Raises ConfigError.
    """
    if not bool((sigmas < 1).all()):
        raise ConfigError(
            f"a flow model's noise levels lie below 1, got {float(sigmas.max()):g}; connect AMED Schedule with this MODEL"
        )
    times = sigmas.cpu().double()  # there are devices without float64
    levels = (times / (1 - times)).to(sigmas.dtype)

    def denoiser(y: Tensor, sigma: Tensor, **told: Any) -> Any:
        return model(y / (1 + sigma.reshape(-1, *[1] * (y.dim() - 1))), to_flow(sigma), **told)

    def tell(step: dict[str, Any]) -> None:
        t, scale = to_flow(step["sigma"]), 1 + step["sigma"]
        assert callback is not None
        callback({**step, "x": step["x"] / scale, "sigma": t, "sigma_hat": t})

    drawn = sample_amed(denoiser, x * (1 + levels[0]), levels, extra_args, callback and tell, disable, **options)
    return drawn / (1 + levels[-1])
