"""The mean answer of a model at its highest noise level, measured once: what the first step "mean" starts about.

At sigma_0 a latent says next to nothing of the sample, so a network answers with the mean of the data, or of the class. With
m = E[D(sigma_0 z; sigma_0)] the first evaluation of every sample is known beforehand, D ≈ m + (x - m)(1 - s / sqrt(1 + s²)).
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from amed_engine.adapters.conditions import Conditions
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.adapters.recorded import elsewhere, recorded_wrapping
from amed_engine.adapters.taps import Tap
from amed_engine.engine.model import Model
from amed_engine.engine.resolve import resolve
from amed_engine.errors import ConfigError
from amed_engine.sampling.modes import leaving_modes
from amed_engine.sampling.modules import module_of, said
from amed_engine.solvers.mean import MAX_VALUES, Mean
from amed_engine.solvers.plan import Plan, own_range

logger = logging.getLogger("amed_engine")

LATENTS = 32  # of one mean
EVALUATIONS = 512  # in all
MAX_CLASSES = 16  # that have a mean each
_SEED = 0x0A3ED
_AT_ONCE = 8  # rows, as few as a served batch
_KEPT = 64

_known: dict[tuple, Mean] = {}
_lock = threading.Lock()


@leaving_modes
def measure_mean(
    model: Any,
    *,
    sigma_max: float | None = None,
    shape: tuple[int, ...] | None = None,
    label_dim: int | None = None,
    weights: str | os.PathLike | None = None,
) -> Mean:
    """m = E[D(sigma_max z; sigma_max)] of a model, for `make_plan(afs="mean", mean=...)`.

    Over 32 latents in pairs z and -z, whose differences to the mean cancel to first order; for up to 16 classes one for each
    and one for none, from the same latents; for more one for all of them; for bound conditions at least one evaluation each;
    at most 512 evaluations in all. The latents are always the same, the global generators are untouched. Measured once a
    process for each model, and anew where its weights, buffers, hooks or attributes (but whole numbers) changed.
    model, shape, label_dim, weights: as `Sampler` takes them. sigma_max: None is the model's own.
    Raises ConfigError.
    """
    resolved = resolve(model, shape=shape, label_dim=label_dim, sigma_max=sigma_max, weights=weights)
    return mean_of(resolved, own_range(resolved.sigma_min, resolved.sigma_max)[1])


def mean_of(model: Model, sigma: float) -> Mean:
    """The mean answer at this noise level, measured or remembered."""
    if model.shape is None:
        raise ConfigError(
            "the mean answer is measured on latents, and the model does not say what shape its samples have; pass "
            f"{model.shape_asked}, or another afs than 'mean'"
        )
    if model.continuous:
        raise ConfigError(
            "the mean answer is one for all samples or one a class, and this model is told numbers, of which it would be a "
            "function; pass another afs than 'mean'"
        )
    if _numbers(model) > MAX_VALUES:
        raise ConfigError(
            f"the mean answer of samples {tuple(model.shape)} has {_numbers(model)} numbers, more than the {MAX_VALUES} "
            "that are kept; pass another afs than 'mean'"
        )
    sigma = float(f"{sigma:.9g}")  # the ends of schedules are rounded, each its own way
    identity = identify(model)
    key = (identity, _settings(model), model.precision, model.shape, model.label_dim, sigma)
    known = None if identity is None else _known.get(key)
    if known is None:
        rows, latents = _measured(model, sigma)
        if not bool(rows.isfinite().all()):
            raise ConfigError(f"the model's answers at sigma {sigma:g} are not finite; look at what it returns")
        facts = {"classes": model.label_dim, "latents": latents, "model": identity, "dtype": model.precision}
        known = Mean.of(rows, sigma=sigma, **facts)
        if identity is not None:
            _keep(key, known)
    return known


def _keep(key: tuple, mean: Mean) -> None:
    with _lock:
        while len(_known) >= _KEPT:
            del _known[next(iter(_known))]
        _known[key] = mean


def mean_if_kept(model: Model, sigma: float) -> Mean | None:
    """The mean answer; None, with a warning, where its numbers are more than are kept."""
    if model.shape is not None and _numbers(model) > MAX_VALUES:
        told = 'afs="mean" is left out: its mean answer has %d numbers, more than the %d that are kept'
        logger.warning(told, _numbers(model), MAX_VALUES)
        return None
    return mean_of(model, sigma)


def _numbers(model: Model) -> int:
    """Of a mean answer at least: one for all samples, and one for no class where there are any."""
    return math.prod(model.shape or ()) * (2 if model.label_dim else 1)


@overload
def measured(plan: Plan, model: Model, known: Mean | None = None) -> Plan: ...
@overload
def measured(plan: Plan | None, model: Model, known: Mean | None = None) -> Plan | None: ...
def measured(plan: Plan | None, model: Model, known: Mean | None = None) -> Plan | None:
    """The plan with its mean answer, where it starts about one and has none: the one known, or measured."""
    if plan is None or plan.afs != "mean" or plan.mean is not None:
        return plan
    sigma = plan.sigmas[0]
    return plan.about(
        known if known is not None and known.is_for(sigma, None, model.precision) else mean_of(model, sigma)
    )


def check_mean(plan: Plan, model: Model, *, verify: bool) -> None:
    """Whether a plan's mean answer, if it has one, is this model's. Raises ConfigError."""
    if (mean := plan.mean) is None:
        return
    if model.shape is not None and mean.shape != tuple(model.shape):
        raise ConfigError(
            f"this plan's mean answer has shape {mean.shape}, the model's samples {tuple(model.shape)}; {_ANEW}"
        )
    if model.continuous or mean.classes != model.label_dim:
        raise ConfigError(
            f"this plan's mean answer is for {mean.classes} classes, the model has {model.classes}; {_ANEW}"
        )
    if verify and not (mean.is_for(mean.sigma, None, model.precision) and _is_of(mean, model, plan)):
        raise ConfigError(
            "this plan's mean answer was measured on another model, or in another dtype: the fingerprints differ; "
            f"{_ANEW}, or pass verify=False to use it all the same"
        )


def _is_of(mean: Mean, model: Model, plan: Plan) -> bool:
    """Whether it is this model's, whatever bottleneck the model reads beside its answer."""
    if mean.model is None or (own := identify(model)) is None:
        return True
    others = elsewhere(model.network, recorded_wrapping(plan))
    return mean.model == own or any(mean.model == _with_tables(model, other) for other in others)


_ANEW = "measure it anew: pass dataclasses.replace(plan, mean=None)"


def identify(model: Model) -> str | None:
    """The fingerprint of a model, and of the conditions bound to it; None for a callable without parameters."""
    own = fingerprint(model.network)
    return None if own is None else _with_tables(model, own)


def _with_tables(model: Model, own: str) -> str:
    tables = [table for bound in _bound(model) for table in bound.named_buffers()]
    if not tables:
        return own
    digest = hashlib.sha256(own.encode())
    for name, table in sorted(tables, key=lambda named: named[0]):
        digest.update(f"{name}:{tuple(table.shape)};".encode())
        digest.update(table.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _settings(model: Model) -> tuple:
    """What beside its weights a model's answer may depend on, as far as it shows: whose modules they are, hooks, buffers, and
    attributes; but no whole numbers, which may count calls."""
    module = module_of(model.network)
    parts = () if module is None else module.modules()
    return tuple(each for part in parts for each in (_whose(part), *_hooks(part), *_buffers(part), *_attributes(part)))


def _whose(part: nn.Module) -> Any:
    """A module of another's making itself, not kept alive; of torch's and this package's layers the class, which says all."""
    known = type(part).__module__.startswith(("amed_engine.", "torch.nn.", "torch._dynamo."))
    return type(part) if known else weakref.ref(part)


def _hooks(part: nn.Module) -> Iterator[int]:
    """Their numbers, which torch gives to one each; not of those that read the bottleneck."""
    for number, hook in (*part._forward_pre_hooks.items(), *part._forward_hooks.items()):
        if not isinstance(hook, Tap):
            yield number


def _buffers(part: nn.Module) -> Iterator[bytes]:
    for buffer in part.buffers(recurse=False):
        if buffer.device.type != "meta":
            numbers = buffer.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            yield hashlib.sha256(numbers.tobytes()).digest()


def _attributes(part: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(part).items():
        values = value.values() if isinstance(value, dict) else (value,)
        if name != "training" and values and all(isinstance(each, (float, str, bool)) for each in values):
            yield name, repr(value)


def _bound(model: Model) -> list[Conditions]:
    """The conditions that are bound to a model, within whatever wraps it."""
    network = module_of(model.network)
    modules = () if network is None else network.modules()
    return [module for module in modules if isinstance(module, Conditions) and module.count]


def paired_latents(count: int, shape: Sequence[int]) -> Tensor:
    """The latents (count, *shape) of unit variance that a mean is measured on, z and -z, always the same."""
    half = torch.randn(-(-count // 2), *shape, generator=_generator(), dtype=torch.float32, device="cpu")
    return torch.cat([half, -half])[:count] if count > 1 else half


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


@torch.no_grad()
def _measured(model: Model, sigma: float) -> tuple[Tensor, int]:
    """Rows as `Mean` has them, and over how many latents each is."""
    labels = _label_rows(model)
    count = min(LATENTS, EVALUATIONS // len(labels))
    x = paired_latents(count, model.shape).to(model.device) * sigma  # type: ignore[arg-type]
    rows = [_answer(model, x, sigma, label) for label in labels]
    if model.label_dim and not _knows_none(model):  # nothing asks for it but a mixture of the others
        rows.insert(0, torch.stack(rows).mean(0))
    return torch.stack(rows), count


def _answer(model: Model, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    rows = None if labels is None else (labels.repeat(len(x), 1) if len(labels) == 1 else labels[: len(x)]).to(x)
    total = torch.zeros_like(x[0], dtype=torch.float64)
    for start in range(0, len(x), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        told = () if rows is None else (rows[part],)
        total += model.denoise(x[part], x.new_full((len(x[part]),), sigma), *told).x0.double().sum(0)
    return total / len(x)


def _label_rows(model: Model) -> list[Tensor | None]:
    """Of each mean the labels (1 or LATENTS, K) that it is asked with; None without classes."""
    count = model.label_dim
    if not count:
        return [None]
    none = [torch.zeros(1, count, device="cpu")] if _knows_none(model) else []
    limit = min(EVALUATIONS - 1 if _bound(model) else MAX_CLASSES, MAX_VALUES // math.prod(model.shape) - 1)  # type: ignore[arg-type]
    if count <= limit:
        return [*none, *torch.eye(count, device="cpu")[:, None]]
    drawn = torch.randint(count, (LATENTS,), generator=_generator(), device="cpu")
    return [*none, torch.nn.functional.one_hot(drawn, count).float()]


def _knows_none(model: Model) -> bool:
    """Whether a zero row of labels is no class to it, as far as it says."""
    return said(model.network, "can_guide", True)
