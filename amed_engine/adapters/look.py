"""A look at a denoiser in three calls: can its answers be the mean of clean data, whatever the data are?

The true D(x; sigma) = E[x0 | x] has the Jacobian Cov(x0 | x)/sigma², symmetric without negative eigenvalues, so that answers
never run against the noise: sum_i <D_i - D̄, x_i - x̄> >= 0. For Gaussian data of covariance C, with a the eigenvalues of
C (C + sigma²)^-1, latents x = sigma n have

    <D, n> = sigma Σa,    |D|² = sigma² Σa²,    d log<D, n> / d log(1/sigma) = 1 - 2 Σa²/Σa:

far above the data, where Σa² is small beside Σa, answers differ by (data variance)/sigma and grow as sigma falls. The noise as
an answer stays as it is, and so does that of a consistency function, which is the sample of the latent at every noise level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from amed_engine.errors import ConfigError

ROWS = 8  # latents at sigma_max, half of them at each of the other two
LARGE = 4096  # numbers in a sample, from which on half as many tell as much
RATIO = 3.0  # of the highest noise level to the one below it


class Level(NamedTuple):
    """What the answers D to latents x = c + sigma n have of n, all about their means over the latents.

    gain: <D, n>/<n, n>. likeness: the cosine of D and n. spread: standard deviation of D over the latents.
    """

    sigma: float
    gain: float
    likeness: float
    spread: float

    @property
    def kept(self) -> float:
        """The part of the noise that is left in the answer: Σa of the dimension, between 0 and 1 for Gaussian data."""
        return self.gain / self.sigma


class Figures(NamedTuple):
    """high, below, middle: at sigma_max, a third of it, and a noise level of the size of the answers.

    growth: d log<D, n> / d log(1/sigma) from high to below; nan where a gain is not positive. change: mean square of what
    the answers to the same noise change between the two, over that of their spread. share: Σa²/Σa, mean of the two.
    size: root mean square of the network's own part of D at sigma_max.
    """

    high: Level
    below: Level
    middle: Level
    growth: float
    change: float
    share: float
    size: float


class Asked(NamedTuple):
    """ask: (x (B, ...), sigma (B,)) -> D in float32. skip: of sigma, the part of x that is added to what the network says.
    nearest: of a network that knows the levels of a table alone, the one next to a noise level. middle: the lowest to look at,
    None for one of the size of the answers."""

    ask: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    sigma_min: float
    sigma_max: float
    device: torch.device
    skip: Callable[[Tensor], Tensor] = torch.zeros_like
    nearest: Callable[[float], float] = float
    middle: float | None = None


def figures_of(asked: Asked) -> Figures:
    """Raises ConfigError for numbers that are not finite."""
    ask, shape, sigma_min, sigma_max, device, skip, nearest, lowest = asked
    generator, half = torch.Generator().manual_seed(0), ROWS // (2 if math.prod(shape) < LARGE else 4)
    noise = torch.randn((2 * half, *shape), generator=generator, dtype=torch.float32, device="cpu")

    def answers(sigma: float, rows: Tensor, about: Tensor | float = 0.0) -> Tensor:
        x = (about + sigma * rows).to(device, torch.float32)
        answer = ask(x, x.new_full((len(x),), sigma)).double().cpu()
        _check_finite(answer, sigma)
        return answer

    first, second, low = noise[:half], noise[half:], nearest(sigma_max / RATIO)
    top, below = answers(sigma_max, noise), answers(low, first)
    size = (top - top.mean()).square().mean().sqrt().item()
    middle = nearest(lowest or min(max(size, sigma_min, 1e-4 * sigma_max), sigma_max / 16))
    at = _level(sigma_max, top[:half], first), _level(low, below, first)
    part = skip(torch.full((1,), sigma_max, device=device)).item()
    positive = min(level.gain for level in at) > 0 and low < sigma_max
    return Figures(
        _level(sigma_max, top, noise),
        at[1],
        _level(middle, answers(middle, second, top.mean(0)), second),
        growth=math.log(at[1].gain / at[0].gain, sigma_max / low) if positive else math.nan,
        change=_ratio((below - top[:half]).square().mean().item(), at[0].spread ** 2),
        share=sum(level.spread**2 / (level.sigma * level.gain) for level in at) / 2 if positive else math.nan,
        size=(top - part * sigma_max * noise).square().mean().sqrt().item(),
    )


def _level(sigma: float, answers: Tensor, noise: Tensor) -> Level:
    d, n = (rows.double() - rows.double().mean(0) for rows in (answers, noise))
    both, of_d, of_n = (d * n).sum().item(), d.square().sum().item(), n.square().sum().item()
    return Level(
        sigma, both / of_n, _ratio(both, math.sqrt(of_d * of_n)), math.sqrt(of_d / (d[0].numel() * (len(d) - 1)))
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _check_finite(answer: Tensor, sigma: float) -> None:
    if not bool(answer.isfinite().all()):
        bad, count = int((~answer.isfinite()).sum()), answer.numel()
        share = f"{bad / count:.0%}" if bad > count / 100 else f"{bad} of {count} numbers"
        raise ConfigError(
            f"{share} of what the network answers to noise at sigma={sigma:.3g} is nan or infinite; check its weights, its "
            "dtype (float16 ends at 65504) and the noise levels it was trained for, or pass verify=False"
        )


# ---- what the figures say


def keeps_noise(seen: Figures) -> bool:
    """Most of the noise at sigma_max is left in the answer: the data are wider than sigma_max, or it is no denoiser's."""
    return seen.high.likeness > 0.9 and seen.high.kept > 0.75


def opposing(seen: Figures) -> Level | None:
    """A level at which answers run against the noise, as none of a denoiser do; a few per cent are errors of training."""
    high = seen.high
    if high.likeness < -0.9 and (high.kept < -0.5 or high.gain < -0.5 * max(1.0, seen.size)):
        return high
    if seen.below.likeness < -0.6 and seen.below.kept < -0.08:
        return seen.below
    return seen.middle if seen.middle.likeness < -0.25 and seen.middle.kept < -0.05 else None


def widens(seen: Figures) -> bool:
    """Whether sigma² times what is kept, the variance of x0 given x, falls from a third of sigma_max to sigma_max.

    More noise never tells more of the data. Networks err by a few per cent of the noise: more, or as much below as well.
    """
    below, middle = seen.below, seen.middle
    grown = below.kept > 2 * RATIO**2 * max(seen.high.kept, 0.0) + 0.025 and below.likeness > 0.9
    return grown and (below.kept > 0.1 or (middle.kept > 0.75 and middle.likeness > 0.9))


def stays(seen: Figures) -> bool:
    """Whether answers at sigma_max differ from latent to latent, and are the same at a third of it.

    Differences that grow towards the data, or are small beside what the network says, are errors of a trained one.
    """
    differ = seen.high.spread > 0.05 * seen.size and seen.middle.spread < 1.5 * seen.high.spread
    same = abs(seen.growth) < 0.3 and seen.growth < 0.5 - seen.share and seen.change < 0.3
    return differ and same and 0 < seen.share < 0.25


def is_noise(seen: Figures) -> bool:
    """Whether what stays is the noise of the latents itself, at its own size."""
    return min(seen.high.likeness, seen.below.likeness) > 0.9 and 0.7 < seen.high.gain < 2.6
