"""The loop as published code writes it: AMED-Solver's update (arXiv:2312.00094) as separate tensor operations.

Written from the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Workload

NFE = 5
INTERVALS = 3  # two evaluations each, the first of all replaced by its analytic estimate
EPSILON_T = 1e-3


def vp_levels(count: int, low: float, high: float, device: torch.device) -> Tensor:
    """sigma(t) = sqrt(exp(b_d t²/2 + b_0 t) - 1) at equally spaced t from 1 to 1e-3, made anew for every sample."""
    a, b = math.log1p(low**2), math.log1p(high**2)
    beta_d = 2 * (a / EPSILON_T - b) / (EPSILON_T - 1)
    t = torch.linspace(1, EPSILON_T, count, dtype=torch.float64, device=device)
    return ((beta_d * t**2 / 2 + (b - beta_d / 2) * t).exp() - 1).sqrt().float()


Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (x, sigma) -> D, bottleneck


@contextmanager
def _bottleneck(network: nn.Module) -> Iterator[list[Tensor]]:
    """What the last encoder block puts out, read by a hook."""
    seen: list[Tensor] = []
    block = list(network.model.enc.values())[-1] if hasattr(network, "model") else None
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output)) if block else None
    yield seen
    if handle is not None:
        handle.remove()


def hooked(network: nn.Module, labels: Tensor | None) -> Evaluate:
    """One evaluation, its forward hook added before and removed after."""

    def evaluate(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        with _bottleneck(network) as seen:
            denoised = image_of(network(x, sigma) if labels is None else network(x, sigma, labels))
        return denoised, seen[-1] if seen else None

    return evaluate


def returned(network: Callable, labels: Tensor | None, *, clone: bool = False) -> Evaluate:
    """One evaluation of a network that returns its bottleneck: hooks do not fire in a compiled one."""

    def evaluate(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        if clone:
            torch.compiler.cudagraph_mark_step_begin()
        output = network(x, sigma) if labels is None else network(x, sigma, labels)
        denoised, features = (output, None) if isinstance(output, Tensor) else output
        if not clone:
            return denoised, features
        # The next call of a captured network writes over its outputs.
        return denoised.clone(), None if features is None else features.clone()

    return evaluate


def image_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def plain_loop(workload: Workload, evaluate: Evaluate, predictor: nn.Module, latents: Tensor) -> Tensor:
    """AMED-Solver at NFE 5 with an analytic first step, one tensor operation after the other."""
    sigmas = vp_levels(INTERVALS + 1, *workload.sigmas, latents.device)
    batch = latents.shape[0]
    x = latents * sigmas[0]
    for i in range(INTERVALS):
        sigma, sigma_next = sigmas[i].expand(batch), sigmas[i + 1].expand(batch)
        features = None
        if i == 0:
            d = x / (1 + wide(sigma) ** 2).sqrt()
        else:
            denoised, features = evaluate(x, sigma)
            d = (x - denoised) / wide(sigma)
        r, scale_dir, scale_time = predictor(features, sigma, sigma_next)
        middle = sigma_next**r * sigma ** (1 - r)
        y = x + wide(middle - sigma) * d
        denoised, _ = evaluate(y, scale_time * middle)
        d = (y - denoised) / wide(middle)
        x = x + wide(scale_dir) * wide(sigma_next - sigma) * d
    return x


def wide(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)
