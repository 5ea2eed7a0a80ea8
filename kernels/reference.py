"""The definition of every operation in plain torch. Every faster implementation is tested against this file.

All functions are differentiable by autograd, traceable and exportable (no data-dependent control flow).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for a float64 state, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def combine(sources: Sequence[Tensor], coeffs: Tensor) -> list[Tensor]:
    """outputs[m][b] = Σ_j coeffs[m, j, b] · sources[j][b], in the dtype of sources[0].

    sources: J tensors (B, ...); coeffs: (M, J, B) or (M, J, 1), float32, or float64 with a float64 sources[0].
    """
    first = sources[0]
    wide = [source.to(coeffs.dtype) for source in sources]
    per_sample = coeffs.reshape(*coeffs.shape, *[1] * (first.dim() - 1))  # (M, J, B, 1, ...)
    outputs = []
    for row in per_sample.unbind(0):
        coeff, *others = row.unbind(0)
        total = coeff * wide[0]
        for coeff, source in zip(others, wide[1:], strict=True):
            total = torch.addcmul(total, coeff, source)
        outputs.append(total.to(first.dtype))
    return outputs


def combine_into(sources: Sequence[Tensor], coeffs: Tensor, out: Sequence[Tensor]) -> None:
    """`combine` into given tensors, each of which may be a source."""
    for target, value in zip(out, combine(sources, coeffs), strict=True):
        target.copy_(value)


def combine_coeff_grad(grads: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """Per-sample dot products (M, J, B): result[m, j, b] = Σ_i grads[m][b, i] · sources[j][b, i].

    Accumulated and returned in float32, or float64 with float64 grads.
    """
    dtype = accumulation_dtype(grads[0].dtype)
    g = torch.stack([grad.to(dtype).flatten(1) for grad in grads])  # (M, B, N)
    s = torch.stack([source.to(dtype).flatten(1) for source in sources])  # (J, B, N)
    return torch.einsum("mbn,jbn->mjb", g, s).contiguous()


def coeff_grad_into(grads: Sequence[Tensor], sources: Sequence[Tensor], result: Tensor) -> None:
    """`combine_coeff_grad` into a given tensor."""
    result.copy_(combine_coeff_grad(grads, sources))


class MidpointWeights(NamedTuple):
    """Parameters of the AMED predictor, named as in the published state dict; E noise channels, P = h·w.

    float32, or float64 with float64 noise levels. A scale head that the predictor lacks is None.
    """

    map_layer0_weight: Tensor  # (E, E)
    map_layer0_bias: Tensor  # (E,)
    enc_layer0_weight: Tensor  # (H, P)
    enc_layer0_bias: Tensor  # (H,)
    enc_layer1_weight: Tensor  # (K, H)
    enc_layer1_bias: Tensor  # (K,)
    fc_r_weight: Tensor  # (1, K + 2 E)
    fc_r_bias: Tensor  # (1,)
    fc_scale_dir_weight: Tensor | None = None  # (1, K + 2 E)
    fc_scale_dir_bias: Tensor | None = None  # (1,)
    fc_scale_time_weight: Tensor | None = None  # (1, K + 2 E)
    fc_scale_time_bias: Tensor | None = None  # (1,)


class MidpointStep(NamedTuple):
    """What the predictor says about a step, and the coefficients of AMED-Solver that follow from it."""

    r: Tensor  # (B,) in (0, 1): the midpoint on the logarithmic scale
    scale_dir: Tensor  # (B,) factor of the direction
    scale_time: Tensor  # (B,) factor of the noise level told to the network
    sigma: Tensor  # (B,) noise level of the midpoint, sigma_next^r · sigma^(1-r)
    sigma_net: Tensor  # (B,) scale_time · sigma of the midpoint
    to_midpoint: Tensor  # (1, 2, B) for combine([x, D])
    to_next: Tensor  # (1, 3, B) for combine([x, y, D at y])


def frequencies(channels: int, device: torch.device | None = None) -> Tensor:
    """Frequencies of the positional embedding, 10000^(-k / (E/2 - 1)), (E / 2,).

    In float32 whatever the precision of a predictor: published ones were trained with these rounded frequencies.
    """
    half = channels // 2
    k = torch.arange(half, dtype=torch.float32, device=device)
    return (1 / 10000) ** (k / (half - 1))


@lru_cache
def frequency_values(channels: int) -> tuple[float, ...]:
    """`frequencies` as numbers, for compiled implementations."""
    return tuple(frequencies(channels, torch.device("cpu")).tolist())


def noise_embedding(sigma: Tensor, frequency: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(map_layer0([sin(sigma·f), cos(sigma·f)])): () or (B,) -> (1 or B, E)."""
    angle = sigma.reshape(-1, 1).to(weight.dtype) * frequency.to(weight.dtype)
    return silu(linear(torch.cat([angle.sin(), angle.cos()], dim=1), weight, bias))


def predict(
    features: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weights: MidpointWeights,
    frequency: Tensor,
    scale_dir: float,
    scale_time: float,
    scales: str = "bounded",
) -> tuple[Tensor, Tensor, Tensor]:
    """The AMED network: (r, scale_dir, scale_time), each (B,) in the dtype of weights.

        z = [enc_layer1(silu(enc_layer0(features))), emb(sigma), emb(sigma_next)]
        r = sigmoid(fc_r z)
        scale = 1 + s·(2·sigmoid(fc_scale z) - 1), or exp(s·tanh(fc_scale z)) if scales is "wide"

    features: (B, h, w) averaged over channels, None for zeros. sigma, sigma_next: () or (B,). frequency: `frequencies`,
    (E / 2,). scale_dir, scale_time: s of each scale, which is 1 where its head is absent. Sizes 1 of B are broadcast.
    """
    weight = weights.enc_layer0_weight
    mean = weight.new_zeros(1, weight.shape[1]) if features is None else features.flatten(1).to(weight.dtype)
    hidden = silu(linear(mean, weight, weights.enc_layer0_bias))
    code = linear(hidden, weights.enc_layer1_weight, weights.enc_layer1_bias)
    u, v = (noise_embedding(s, frequency, *weights[:2]) for s in (sigma, sigma_next))
    (batch,) = torch.broadcast_shapes(code.shape[:1], u.shape[:1], v.shape[:1])
    z = torch.cat([part.expand(batch, -1) for part in (code, u, v)], dim=1)
    r = linear(z, weights.fc_r_weight, weights.fc_r_bias).squeeze(1).sigmoid()
    direction = _scale(z, weights.fc_scale_dir_weight, weights.fc_scale_dir_bias, scale_dir, scales)
    time = _scale(z, weights.fc_scale_time_weight, weights.fc_scale_time_bias, scale_time, scales)
    return r, direction, time


def _scale(z: Tensor, weight: Tensor | None, bias: Tensor | None, width: float, scales: str) -> Tensor:
    if weight is None or bias is None:
        return z.new_ones(z.shape[0])
    value = linear(z, weight, bias).squeeze(1)
    return (width * value.tanh()).exp() if scales == "wide" else 1 + width * (2 * value.sigmoid() - 1)


def midpoint(
    features: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weights: MidpointWeights,
    scale_dir: float = 0.0,
    scale_time: float = 0.0,
) -> MidpointStep:
    """AMED predictor (Zhou et al. 2023, arXiv:2312.00094) and the coefficients of its solver.

        z = [enc_layer1(silu(enc_layer0(mean over channels of features))), emb(sigma), emb(sigma_next)]
        r = sigmoid(fc_r z),   scale = 1 + s·(2·sigmoid(fc_scale z) - 1),   m = sigma_next^r · sigma^(1-r)
        y  = x + (m - sigma)·(x - D)/sigma
        x' = x + scale_dir·(sigma_next - sigma)·(y - D_y)/m

    features: (B, C, h, w), (B, h, w) if already averaged, or None (zeros: nothing was evaluated, as under AFS).
    sigma, sigma_next: (B,) or (1,) shared; they set the dtype of the result. scale_dir, scale_time: half-width
    of each scale's range, 0 where the head is absent. The batch of the result is that of features, else of sigma.
    """
    return split_step(midpoint_table(features, sigma, sigma_next, weights, scale_dir, scale_time))


def midpoint_table(
    features: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weights: MidpointWeights,
    scale_dir: float = 0.0,
    scale_time: float = 0.0,
) -> Tensor:
    """`midpoint` as one tensor (10, B), the form that the compiled implementations write; see `split_step`."""
    if features is not None:
        features = features.to(sigma.dtype)
        features = features.mean(1) if features.dim() == 4 else features
    frequency = frequencies(weights.map_layer0_weight.shape[0], sigma.device)
    choices = predict(features, sigma, sigma_next, weights, frequency, scale_dir, scale_time)
    return _table(*choices, sigma, sigma_next)


def midpoint_into(
    features: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weights: MidpointWeights,
    scale_dir: float,
    scale_time: float,
    table: Tensor,
) -> None:
    """`midpoint_table` into a given tensor."""
    table.copy_(midpoint_table(features, sigma, sigma_next, weights, scale_dir, scale_time))


def _table(r: Tensor, scale_dir: Tensor, scale_time: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    mid = sigma_next**r * sigma ** (1 - r)
    ratio = mid / sigma
    slope = scale_dir * (sigma_next - sigma) / mid
    one = torch.ones_like(r)
    return torch.stack([r, scale_dir, scale_time, mid, scale_time * mid, ratio, 1 - ratio, one, slope, -slope])


def split_step(table: Tensor) -> MidpointStep:
    """Names for the rows of the (10, B) table: views, no copy."""
    r, scale_dir, scale_time, sigma, sigma_net = table[:5].unbind(0)
    return MidpointStep(r, scale_dir, scale_time, sigma, sigma_net, table[5:7].unsqueeze(0), table[7:].unsqueeze(0))
