"""The denoiser protocol and the wrappers that turn one denoiser into another.

A denoiser is any callable (x, sigma, **cond) -> D or (D, features): x (B, ...), sigma (B,) noise levels, D the estimate
of the clean data in x's dtype, features the bottleneck activation (B, C, h, w) that a predictor reads, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import as_module, copied, never_writes


class Denoised(NamedTuple):
    """A denoiser's answer: x0, the estimate of the clean data; features, the bottleneck (B, C, h, w) or None."""

    x0: Tensor
    features: Tensor | None = None


# Named, so that an exported network that returns it can be saved to a file; the name is that of files, not of this module.
_register_namedtuple(Denoised, serialized_type_name="amed_engine.denoiser.Denoised")

Denoiser = Callable[[Tensor, Tensor], Denoised | Tensor | tuple]


def answered(x0: Tensor, features: Tensor | None) -> Denoised:
    """A Denoised; under torch.jit.trace, whose graphs return nothing but tensors, D alone where there are no features."""
    return x0 if features is None and is_tracing() else Denoised(x0, features)  # type: ignore[return-value]


def as_denoised(output: Any) -> Denoised:
    """D or (D, features) as a Denoised."""
    if isinstance(output, Tensor):
        return Denoised(output)
    parts: tuple[Any, ...] = tuple(output) if isinstance(output, (tuple, list)) else ()
    if 1 <= len(parts) <= 2 and isinstance(parts[0], Tensor) and isinstance(parts[-1], (Tensor, type(None))):
        return Denoised(*parts)
    of = f" of {', '.join(type(part).__name__ for part in parts)}" if parts else ""
    raise ConfigError(
        f"a denoiser must return D or (D, features) as tensors, got {type(output).__name__}{of}; give a function "
        "(x, sigma) -> (D, features), or the raw network to amed_engine.wrap"
    )


# What else there is to do about features that nobody can read.
OWN_FEATURES = "; or give Sampler a function (x, sigma) -> (D, features) that makes (B, C, h, w) of them"


def unread(caught: Any, rows: Tensor) -> Tensor:
    """What stands for a bottleneck that was found but cannot be read, for as many rows: (B, 0, *the shape it had).

    A tensor without numbers, so that it is compiled, exported and parted like any; the predictor that reads it refuses it.
    """
    shape = tuple(caught.shape) if isinstance(caught, Tensor) else ()
    return rows.new_empty((rows.shape[0], 0, *shape))


def check_features(features: Tensor, size: tuple[int, int] | None = None, rows: int | None = None) -> None:
    """Raise ConfigError unless features are (B, C, h, w), of this size and batch where it is known."""
    if features.dim() > 1 and features.shape[1] == 0:
        got = tuple(features.shape[2:]) or "no tensor, or its module was not called"
        raise ConfigError(
            f"this model has a bottleneck that cannot be read as (B, C, h, w): {got} for {features.shape[0]} samples; wrap it "
            f"with bottleneck=None, with which predictors read zeros, or with the name of another module{OWN_FEATURES}"
        )
    height, width = size or ("h", "w")
    if features.dim() != 4 or (size is not None and tuple(features.shape[2:]) != size):
        raise ConfigError(
            f"predictor expects bottleneck features (B, C, {height}, {width}), got {tuple(features.shape)}; it was made for "
            "another network"
        )
    if rows is not None and not torch.compiler.is_compiling() and not is_tracing() and features.shape[0] != rows:
        raise ConfigError(
            f"predictor expects a row of features for each of {rows} samples, got {tuple(features.shape)}, as where frames are "
            f"in the batch; wrap the model with bottleneck=None, with which predictors read zeros{OWN_FEATURES}"
        )


def parted(features: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    """Features of several batches in one; those that have other rows than the batch, as of frames, are not read."""
    if features is None:
        return [None] * len(sizes)
    if is_tracing() or (features.dim() and features.shape[0] == sum(sizes)):
        return [*features.split(sizes)]
    return [unread(features, features.new_empty(size)) for size in sizes]


def ask(network: Callable[..., Any], *inputs: Any, foreign: bool = True, **conditions: Any) -> Denoised:
    """The answer of a network (x, sigma[, labels], **conditions) -> D or (D, features).

    foreign: it is of another's making. Such a network may write to what it is given, and may answer in one buffer call after
    call, as CUDA graphs and TensorRT do: it gets copies, and its answer is copied before it is asked again.
    """
    if not foreign:
        return as_denoised(network(*inputs, **conditions))
    given = {name: copied(value) for name, value in conditions.items()}
    answer = as_denoised(network(*map(copied, inputs), **given))
    return Denoised(*map(copied, answer))


def owned(denoiser: Denoiser) -> Denoiser:
    """A caller's denoiser asked as `ask` does; one that never writes stays as it is."""
    if never_writes(denoiser):
        return denoiser
    network = as_module(denoiser)
    return lambda x, sigma: ask(network, x, sigma)


def known_first(denoiser: Denoiser, answer: Denoised) -> Denoiser:
    """The denoiser, for a trajectory whose first answer is known: it is given, not computed."""
    known = [answer]
    return lambda x, sigma: known.pop() if known else as_denoised(denoiser(x, sigma))


def analytic_first_step(x: Tensor, sigma: Tensor, mean: Tensor | None = None) -> Denoised:
    """AFS as a denoiser: D = x - sigma (x - m) / sqrt(1 + sigma²), without features and without a network evaluation.

    It is exact for data of unit variance about m: zero, or `mean` (1 or B, ...). Dockhorn et al. 2022 (arXiv:2210.05475),
    who have m = 0.
    """
    sigma = sigma.reshape(-1, *[1] * (x.dim() - 1))
    return Denoised(x - sigma * (1 / (1 + sigma**2).sqrt()) * (x if mean is None else x - mean))


def mean_of_labels(rows: Tensor, labels: Tensor | None, scale: float | None) -> Tensor:
    """The mean answer for each sample's label under guidance, (1 or B, ...): m_0 + scale Σ_k labels_k (m_k - m_0).

    rows: (R, ...) as `Mean` has them, m_0 first. labels: (B, K) or None. scale: None is no guidance, as 1 is.
    """
    if labels is None or len(rows) == 1:
        return rows[:1]
    if len(rows) < 1 + labels.shape[1]:  # one for any class
        labels = (labels != 0).any(1, keepdim=True).to(rows.dtype)
    # In float64, which no reduced-precision matrix product of the device rounds.
    weights, exact = labels.double() * (1 if scale is None else scale), rows.double()
    offsets = weights @ (exact[1:] - exact[:1]).flatten(1)
    return (exact[:1] + offsets.unflatten(1, tuple(rows.shape[1:]))).to(rows.dtype)


def dynamic_thresholding(
    x0: Tensor, quantile: float = 0.995, floor: float = 1.0, ceiling: float | None = None
) -> Tensor:
    """clamp(x0, -s, s) / s with s the per-sample quantile of |x0|, at least `floor` and at most `ceiling`.

    Saharia et al. 2022 (arXiv:2205.11487).
    """
    magnitude = x0.abs().flatten(1)
    # torch.quantile would do, but refuses more than 16 million elements, and ONNX has none; this is its linear interpolation.
    rank = quantile * (magnitude.shape[1] - 1)
    count = magnitude.shape[1] - int(rank)
    highest = magnitude.topk(count, dim=1).values
    below, above = highest[:, -1], highest[:, max(count - 2, 0)]
    s = torch.lerp(below, above, rank - int(rank)).clamp(floor, ceiling)
    s = s.reshape(-1, *[1] * (x0.dim() - 1))
    return x0.clamp(-s, s) / s


def classifier_free(network: Callable[..., Any], labels: Tensor, scale: float) -> Denoiser:
    """Guidance D_u + scale (D_c - D_u) by one doubled batch, with the conditional half's features.

    network: (x, sigma, labels) -> D or (D, features), with zero rows of `labels` (B, K) meaning "no class".
    Ho and Salimans 2022 (arXiv:2207.12598).
    """

    def denoise(x: Tensor, sigma: Tensor) -> Denoised:
        rows = repeat_to(labels, x.shape[0])
        both = network(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([torch.zeros_like(rows), rows]))
        x0, features = as_denoised(both)
        halves = [x.shape[0]] * 2  # not chunk(2): its count would tie a symbolic batch to one size
        unconditional, conditional = x0.split(halves)
        guided = unconditional + scale * (conditional - unconditional)
        return Denoised(guided, parted(features, halves)[1])

    return denoise


def conditioned(network: Callable[..., Any], labels: Tensor) -> Denoiser:
    """The network (x, sigma, labels) with its labels (B, K) bound."""
    return lambda x, sigma: as_denoised(network(x, sigma, repeat_to(labels, x.shape[0])))


def bind_labels(network: Callable[..., Any], labels: Tensor | None, guidance_scale: float | None) -> Denoiser:
    """The network (x, sigma[, labels]) with its labels and guidance bound; without labels there is nothing to guide to."""
    if labels is None:
        return network
    # D_u + 1 (D_c - D_u) = D_c
    if guidance_scale is None or guidance_scale == 1:
        return conditioned(network, labels)
    return classifier_free(network, labels, guidance_scale)


def repeat_to(labels: Tensor, batch: int) -> Tensor:
    """Labels repeated for parallel evaluation points, whose batch is a multiple of the samples'."""
    return labels if labels.shape[0] == batch else labels.repeat(batch // labels.shape[0], 1)


def thresholded(denoiser: Denoiser) -> Denoiser:
    """The denoiser with its data prediction thresholded dynamically; features as they were."""

    def denoise(x: Tensor, sigma: Tensor) -> Denoised:
        denoised = as_denoised(denoiser(x, sigma))
        return denoised._replace(x0=dynamic_thresholding(denoised.x0))

    return denoise


def is_tracing() -> bool:
    """Under jit.trace sizes are tensors: comparing them would be frozen into the graph with a warning."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def one_hot(class_labels: Tensor | None, label_dim: int, like: Tensor) -> Tensor:
    """Class labels as a matrix (B or 1, label_dim) in the dtype and on the device of `like`.

    Integers (B,) become one-hot rows, an integer outside 0 .. label_dim - 1 the zero row; a float or one-hot matrix
    (B, label_dim) is passed on; None is one zero row, the unconditional label. Raises ValueError for another shape.
    """
    if class_labels is None:
        return like.new_zeros(1, label_dim)
    if class_labels.ndim == 1 and not class_labels.is_floating_point():
        class_labels = class_labels[:, None] == torch.arange(label_dim, device=class_labels.device)
    elif not is_tracing() and tuple(class_labels.shape[1:]) != (label_dim,):
        raise ValueError(
            f"class_labels must be integers (B,) or a matrix (B, {label_dim}), got {class_labels.dtype} of shape "
            f"{tuple(class_labels.shape)}"
        )
    return class_labels.to(like)
