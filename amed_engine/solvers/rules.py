"""The linear rules of multistep solvers: from past noise levels to coefficients, and nothing else.

Each rule maps the noise levels of past evaluations, newest first, and the next noise level to a `Row`. Levels are () or
(B,); everything is plain differentiable torch, so the same definition serves tables, training, graphs and export.
The order of a rule is the number of levels it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from amed_engine.solvers.schedule import VPTime
from amed_engine.solvers.stage import Row

Levels = Sequence[Tensor]

AB = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def midpoint_level(sigma: Tensor, sigma_next: Tensor, r: Tensor | float) -> Tensor:
    """m = sigma_next^r · sigma^(1-r), the geometric mean that AMED's r in (0, 1) weighs."""
    return sigma_next**r * sigma ** (1 - r)


def adams_bashforth(sigmas: Levels, sigma_next: Tensor) -> Row:
    """iPNDM: Adams-Bashforth weights as if past steps were equal.

        x_next = x + h · Σ_j AB[order][j] · d_j,   h = sigma_next - sigmas[0]

    Liu et al. 2022 (arXiv:2202.09778), Zhang and Chen 2023 (arXiv:2204.13902).
    """
    h = sigma_next - sigmas[0]
    return Row(1.0, tuple(h * weight for weight in AB[len(sigmas) - 1]))


def deis(sigmas: Levels, sigma_next: Tensor, time: Callable[[Tensor], Tensor]) -> Row:
    """DEIS-tAB: the integral of the polynomial through past directions, in the variable `time(sigma)`.

        x_next = x + Σ_j d_j · ∫ l_j(time(s)) ds   over s from sigmas[0] to sigma_next,   l_j: Lagrange basis

    With time = VP time this is tAB, with the identity rhoAB (exact variable-step Adams-Bashforth). Integrated by
    the tanh-sinh rule in log s, where the integrand is smooth. Zhang and Chen 2023 (arXiv:2204.13902).
    """
    if len(sigmas) == 1:  # l_0 = 1 in any variable
        return adams_bashforth(sigmas, sigma_next)
    nodes, weights = _tanh_sinh(sigmas[0])
    low, high = sigmas[0].log().unsqueeze(-1), sigma_next.log().unsqueeze(-1)
    s = ((high + low) / 2 + (high - low) / 2 * nodes).exp()  # (..., Q)
    ds = s * (high - low) / 2 * weights
    t = time(s)
    past = [time(sigma).unsqueeze(-1) for sigma in sigmas]
    return Row(1.0, tuple((_lagrange(past, j, t) * ds).sum(-1) for j in range(len(past))))


def vp_time(sigma: Tensor) -> Tensor:
    """VP time fitted to sigma 0.002 .. 80, the variable in which the published DEIS interpolates."""
    return VPTime.fitted().time(sigma)


def identity(sigma: Tensor) -> Tensor:
    return sigma


def _lagrange(nodes: Levels, j: int, at: Tensor) -> Tensor:
    basis = torch.ones_like(at)
    for k, node in enumerate(nodes):
        if k != j:
            basis = basis * (at - node) / (nodes[j] - node)
    return basis


def _tanh_sinh(like: Tensor, count: int = 81) -> tuple[Tensor, Tensor]:
    """Nodes and weights on (-1, 1) that converge exponentially for smooth integrands, ends included.

        x_k = tanh(pi/2 sinh(u_k)),   w_k = du · pi/2 cosh(u_k) / cosh²(pi/2 sinh(u_k)),   u_k equally spaced

    Computed where the noise levels are: a table copied from the host could not be captured. Takahasi and Mori 1974.
    """
    u = torch.linspace(-3.2, 3.2, count, dtype=like.dtype, device=like.device)
    stretched = math.pi / 2 * u.sinh()
    return stretched.tanh(), (6.4 / (count - 1)) * math.pi / 2 * u.cosh() / stretched.cosh() ** 2


def dpmpp(sigmas: Levels, sigma_next: Tensor, *, data: bool) -> Row:
    """DPM-Solver++'s multistep form from s to s', order = number of levels, 1 to 3.

        data prediction, d_j = D_j:            x_next = (s'/s) x - (phi1 d_0 + phi2 D1 + phi3 D2),   hh = -h
        noise prediction, d = (x - D) / sigma: x_next = x - s' (phi1 d_0 + phi2 D1 + phi3 D2),       hh = h

    with h = log(s/s'), phi1 = e^hh - 1, phi2 = phi1/hh - 1, phi3 = phi2/hh - 1/2, and D1, D2 the divided differences of d in
    log sigma; at order 2 phi2 D1 is replaced by phi1 D1 / 2. Lu et al. 2022 (arXiv:2211.01095).
    """
    order = len(sigmas)
    if order == 1:  # DDIM, without logarithms, which a table of an AMED predictor cannot say
        ratio = sigma_next / sigmas[0]
        return Row(ratio, (1 - ratio,)) if data else adams_bashforth(sigmas, sigma_next)
    h = _log_ratio(sigmas[0], sigma_next)
    hh = -h if data else h
    phi1 = torch.expm1(hh)
    phi2 = phi1 / hh - 1
    phi3 = phi2 / hh - 0.5
    first, second = _divided_differences(sigmas, h)
    b = _weigh(order, (phi1, (1.0, 0.0, 0.0)), (phi1 / 2 if order == 2 else phi2, first), (phi3, second))
    scale = 1.0 if data else sigma_next
    return Row(sigma_next / sigmas[0] if data else 1.0, tuple(-scale * c for c in b))


def _log_ratio(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    return sigma.log() - sigma_next.log()


def _divided_differences(sigmas: Levels, h: Tensor) -> tuple[tuple, tuple]:
    """D1 and D2 as weights on the directions, newest first; D2 is empty where the order needs none."""
    r0 = _log_ratio(sigmas[1], sigmas[0]) / h
    if len(sigmas) == 2:
        return (1 / r0, -1 / r0), ()
    r1 = _log_ratio(sigmas[2], sigmas[1]) / h
    share = r0 / (r0 + r1)
    newest, older = (1 / r0, -1 / r0, 0.0), (0.0, 1 / r1, -1 / r1)
    first = tuple(n + share * (n - o) for n, o in zip(newest, older, strict=True))
    second = tuple((n - o) / (r0 + r1) for n, o in zip(newest, older, strict=True))
    return first, second


def _weigh(order: int, *terms: tuple) -> tuple:
    """Σ weight · vector over the terms, cut to `order` entries; empty vectors count as zero."""
    return tuple(sum(weight * vector[j] for weight, vector in terms if vector) for j in range(order))


class UniPCWeights:
    """Coefficients of UniPC (arXiv:2302.04867) of order p over one interval s -> s', with h = log(s/s').

        x' = base - B (Σ_k rho_k D1_k + [corrector] rho_p (d_new - d_0)),   D1_k = (d_k - d_0) / r_k
        data prediction:  base = (s'/s) x - (e^-h - 1) D_0      noise prediction:  base = x - s' (e^h - 1) d_0

    B is e^-h - 1 (bh2) or -h (bh1), in noise prediction s' (e^h - 1) or s' h. The weights rho solve a Vandermonde system.
    """

    def __init__(self, sigmas: Levels, sigma_next: Tensor, *, data: bool, variant: str):
        self.data, self.sigma, self.sigma_next = data, sigmas[0], sigma_next
        h = _log_ratio(sigmas[0], sigma_next)
        self.hh = -h if data else h
        self.phi1 = torch.expm1(self.hh)
        self.bh = self.phi1 if variant == "bh2" else self.hh
        self.ratios = [_log_ratio(sigmas[0], sigma) / h for sigma in sigmas[1:]]  # negative: (lambda_k - lambda_0) / h

    def predictor(self) -> Row:
        """From d_0, d_1, ... to the point of the next evaluation."""
        # 1/2 is what the published code uses at order 2, in place of the solved weight.
        rho = [0.5] if len(self.ratios) == 1 else _vandermonde(self.ratios, self._moments())
        return self._row([], rho)

    def corrector(self) -> Row:
        """From d_new, d_0, d_1, ...: the state at s' once the direction there is known."""
        ones = torch.ones_like(self.hh)
        rho = _vandermonde([*self.ratios, ones], self._moments()) if self.ratios else [0.5]
        return self._row([rho[-1]], rho[:-1])

    def _moments(self) -> list[Tensor]:
        """b_k = k! · phi_k(hh) / B for k = 1, 2, ..."""
        moments, phi, factorial = [], self.phi1 / self.hh - 1, 1
        for k in range(1, len(self.ratios) + 2):
            moments.append(phi * factorial / self.bh)
            factorial *= k + 1
            phi = phi / self.hh - 1 / factorial
        return moments

    def _row(self, new: list, rho: Sequence) -> Row:
        """base - B · residual, over [d_new?, d_0, d_1, ...]."""
        scale = 1.0 if self.data else self.sigma_next
        past = [weight / ratio for weight, ratio in zip(rho, self.ratios, strict=True)]
        residual_0 = -sum([*new, *past])
        b = [*new, residual_0, *past]
        b = [-scale * self.bh * c for c in b]
        b[len(new)] = b[len(new)] - scale * self.phi1
        return Row(self.sigma_next / self.sigma if self.data else 1.0, tuple(b))


def _vandermonde(nodes: Levels, moments: Levels) -> list:
    """w with Σ_j w_j nodes_j^k = moments_k, k = 0 .. len(nodes) - 1, in closed form (a solver would synchronize)."""
    return [
        sum(c * moment for c, moment in zip(_basis_polynomial(nodes, j), moments, strict=False))
        for j in range(len(nodes))
    ]


def _basis_polynomial(nodes: Levels, j: int) -> list:
    """Coefficients, constant first, of the polynomial that is 1 at nodes[j] and 0 at the others."""

    def times_factor(poly: list, node: Tensor) -> list:
        scale = 1 / (nodes[j] - node)
        shifted = [0.0, *poly]
        return [(up - node * low) * scale for up, low in zip(shifted, [*poly, 0.0], strict=True)]

    return reduce(times_factor, [node for k, node in enumerate(nodes) if k != j], [1.0])
