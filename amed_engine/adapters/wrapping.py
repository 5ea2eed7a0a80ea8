"""`wrap`: any network as a denoiser, with what is not said inferred, checked and explained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters import taps
from amed_engine.adapters.adapter import Adapter
from amed_engine.adapters.compiled import compiled_of
from amed_engine.adapters.conditions import Conditions
from amed_engine.adapters.discrete import PREDICTS, DiscreteSteps, alphas_cumprod
from amed_engine.adapters.facts import NetworkFacts, check_classes_known, check_known, facts_of
from amed_engine.adapters.family import Family, spread
from amed_engine.adapters.flow import Flow
from amed_engine.adapters.flux import Flux
from amed_engine.adapters.karras import EDM, IDDPM, VE, VP, Consistency, ConsistencyFunction, Denoising
from amed_engine.adapters.labels import CONTINUOUS, check_kind
from amed_engine.adapters.schedulers import Told, betas_of, has_betas, told_by
from amed_engine.errors import ConfigError
from amed_engine.sampling.modes import modes_kept, plain_tensors
from amed_engine.sampling.modules import as_module, bare, device_of, dtype_of, module_of, said

FAMILIES: dict[str, Callable[[], Family]] = {
    "denoised": Denoising,
    "consistency": ConsistencyFunction,
    "edm": EDM,
    "cm": Consistency,
    "vp": VP,
    "ve": VE,
    "iddpm": IDDPM,
    "flow": Flow,
}
PREDICTIONS = (*PREDICTS, *FAMILIES)
# Correlation of a prediction with its input at the highest noise level: near 1 for the noise, near 0 for v.
NOISE_LIKE = 0.9


@plain_tensors()
def wrap(
    model: Any,
    prediction: str | Family | None = None,
    *,
    scheduler: Any = None,
    betas: str | Tensor | None = None,
    bottleneck: str | None = "auto",
    shape: tuple[int, ...] | None = None,
    label_dim: int | None = None,
    labels: str | None = None,
    null_class: int | None = None,
    conditions: Mapping[str, Tensor] | Iterable[str] | None = None,
    null_conditions: Mapping[str, Tensor] | None = None,
    verify: bool = True,
) -> Adapter:
    """A denoiser (x, sigma (B,)[, class_labels]) -> Denoised(D, bottleneck) from a raw network, ready for `Sampler`.

    model: (x_in, time[, labels], **conditions) -> prediction: a U-Net of `amed_engine.networks`, a U-Net or transformer of
        diffusers, one of guided-diffusion, or any other callable.
    prediction: what it predicts: "epsilon", "v" or "x0" (trained on discrete steps), "flow", "edm", "cm", "vp", "ve",
        "iddpm", "denoised", "consistency" (a sample), or a `Family` of your own options. None asks the scheduler, then the
        network.
    scheduler: the diffusers scheduler it was trained with, for prediction, betas and range: D is the scheduler's own. One
        that is not known is refused, and by its name whatever of its configuration would change D otherwise.
    betas: of the discrete steps: "scaled_linear", "linear", "cosine", or alphas_cumprod as a tensor; beside a scheduler that
        has its own, they must be the same.
    bottleneck: dotted name of the module whose output (B, C, h, w) a predictor reads; "auto" knows the published U-Nets, None
        is none, for which predictors read zeros.
    shape: of a sample, where the network does not tell: (C, L), (C, H, W), or (C, F, H, W), as the network takes it.
    label_dim: its number of classes, or of numbers per sample. labels: what reaches the network: classes as one-hot "rows"
        (B, label_dim), where it tells nothing of itself, or as an "index" (B,); or continuous conditions, one "float" per
        sample (B,) or a "vector" (B, label_dim). null_class: the integer that means no class.
    conditions: tables by name, e.g. {"encoder_hidden_states": (P, L, D)}: P prompts, chosen by class_labels; or names alone,
        the tensors being given in each call. null_conditions: the same with one row, for classifier-free guidance.
    verify: evaluate a v-predicting network once, to catch one that predicts the noise.
    Raises ConfigError for whatever cannot work, before any sampling. `print(denoiser)` shows what was inferred, and why.
    """
    _check_callable(model)
    model = as_module(model)
    model = Flux(model) if "FluxTransformer2DModel" in (kind.__name__ for kind in type(bare(model)).__mro__) else model
    check_known(model)
    label_dim = 1 if labels == "float" and label_dim is None else label_dim
    if label_dim is None:
        check_classes_known(model)
    facts = _with_given(facts_of(model), shape, label_dim, null_class, labels)
    told = None if scheduler is None else told_by(scheduler)
    family, why = _choose_family(prediction, facts, scheduler, told, betas)
    if facts.denoises and not isinstance(family, Denoising):
        raise ConfigError(
            f"{type(model).__name__} is a denoiser already and needs no {family.name!r} round it: pass it to Sampler as it is"
        )
    if facts.whole_times:
        family.whole(torch.zeros(1, device="cpu"))
    _check_channels(model, facts)
    tables = _make_conditions(facts, conditions, null_conditions)
    name, found = _choose_bottleneck(model, facts, bottleneck)
    if bottleneck != "auto":
        facts = replace(facts, reduction=None)  # another module's output has its own size
    notes = _notes(model, facts, family, why, tables, found)
    if facts.denoises:  # a denoiser's own range of noise levels
        family.sigma_min = float(said(model, "sigma_min", 0) or family.sigma_min)
        family.sigma_max = float(said(model, "sigma_max", 0) or family.sigma_max)
    adapter = Adapter(model, family, facts, tables, name, notes, found=bottleneck == "auto")
    if verify and family.name == "v":
        _check_not_noise(adapter)
    return adapter


def _check_callable(model: Any) -> None:
    if isinstance(bare(model), Adapter):
        raise ConfigError("this is what wrap returns already: pass it to Sampler")
    if not callable(model):
        raise ConfigError(
            f"model must be a network or another callable (x, t) -> prediction, got {type(model).__name__}"
        )


def _with_given(
    facts: NetworkFacts, shape: Any, label_dim: int | None, null_class: int | None, labels: str | None
) -> NetworkFacts:
    """The facts with what the caller says; contradictions raise."""
    if shape is not None:
        if len(facts.axes or facts.shape or shape) != len(shape):
            raise ConfigError(
                f"the network takes samples ({facts.rank}), got shape={tuple(shape)}; pass one of its rank"
            )
        if facts.in_channels not in (None, shape[facts.channel_axis]):
            raise ConfigError(
                f"the network takes {facts.in_channels} channels, got shape={tuple(shape)}; samples must match it"
            )
        facts = replace(facts, shape=tuple(shape))
    if label_dim is not None:
        if facts.label_dim not in (0, label_dim):
            raise ConfigError(f"the network has {facts.label_dim} classes, got label_dim={label_dim}")
        facts = replace(facts, label_dim=label_dim)
    if null_class is not None:
        if not facts.label_dim:
            raise ConfigError(f"null_class={null_class} was given for a network without classes")
        facts = replace(facts, null_class=null_class, labels=labels or _index_of(facts))
    return facts if labels is None else _with_kind(facts, labels)


def _index_of(facts: NetworkFacts) -> str:
    check_kind(facts.labels, facts.label_dim, facts.null_class)
    return "index"


def _with_kind(facts: NetworkFacts, labels: str) -> NetworkFacts:
    check_kind(labels, facts.label_dim, facts.null_class)
    if facts.diffusers and labels != facts.labels:
        raise ConfigError(f"the network takes its labels as {facts.labels!r}, got labels={labels!r}; leave it out")
    return replace(facts, labels=labels)


def _choose_family(
    prediction: Any, facts: NetworkFacts, scheduler: Any, says: Told | None, betas: Any
) -> tuple[Family, str]:
    """The family, and a word on where it comes from."""
    if isinstance(prediction, Family):
        if scheduler is not None or betas is not None:
            raise ConfigError(
                f"prediction={prediction.name!r} is a Family, which says all: leave scheduler and betas out"
            )
        return copy.deepcopy(prediction), "given"  # it follows the network to its device
    told = None if says is None else says.prediction
    known = told or facts.prediction
    name = prediction or known
    if name is None:
        raise ConfigError(
            f"prediction is not known of this network: pass one of {', '.join(PREDICTIONS)}, or scheduler=pipeline.scheduler"
        )
    if name not in PREDICTIONS:
        raise ConfigError(f"prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    if told is not None and told != name:
        raise ConfigError(f"prediction={name!r} was asked for, but the scheduler says {told!r}; leave prediction out")
    why = "given" if prediction else "from the scheduler" if told else "known of this network"
    if name not in PREDICTS:
        if betas is not None:
            raise ConfigError(f"betas are for {', '.join(PREDICTS)}, not for prediction={name!r}; leave them out")
        return FAMILIES[name]() if says is None or says.family is None else says.family, why
    alphas, source = _choose_betas(betas, facts, scheduler)
    family = DiscreteSteps(name, alphas)
    if says is not None:
        family.sigma_min = max(family.sigma_min, says.sigma_min or family.sigma_min)
        family.sigma_max = min(family.sigma_max, says.sigma_max or family.sigma_max)
    return family, f"{why}; betas {source}"


def _choose_betas(betas: Any, facts: NetworkFacts, scheduler: Any) -> tuple[Tensor, str]:
    if betas is not None:
        given = betas if isinstance(betas, Tensor) else alphas_cumprod(betas)
        _check_scheduler(given, scheduler)
        return given, "given as alphas_cumprod" if given is betas else f"{betas}, given"
    if scheduler is not None:
        return betas_of(scheduler), "from the scheduler"
    if facts.betas is not None:
        return alphas_cumprod(facts.betas), f"{facts.betas}, the custom for this network"
    return alphas_cumprod("linear"), "linear, assumed: pass betas=... if it was trained otherwise"


def _check_scheduler(alphas: Tensor, scheduler: Any) -> None:
    """Betas that are given beside a scheduler must be its own, up to the rounding of its float32."""
    if scheduler is None or not has_betas(scheduler):
        return
    own, given = betas_of(scheduler), alphas.detach().to("cpu", torch.float64)
    if given.shape != own.shape or not torch.allclose(given, own, rtol=1e-3, atol=0):
        raise ConfigError(
            f"betas contradict the scheduler: alphas_cumprod of {len(given)} steps ending at {float(given[-1]):.3g} were "
            f"given, {type(scheduler).__name__} has {len(own)} ending at {float(own[-1]):.3g}; leave one of them out"
        )


def _check_channels(model: Any, facts: NetworkFacts) -> None:
    channels = facts.in_channels
    if channels is None or facts.out_channels is None:
        return
    if facts.out_channels not in (channels, 2 * channels):
        raise ConfigError(
            f"{type(model).__name__} takes {channels} channels and predicts {facts.out_channels}; a denoiser needs the same "
            "number, or twice it with learned variances (networks with extra input channels must be wrapped in a function)"
        )


def _make_conditions(facts: NetworkFacts, conditions: Any, null: Mapping[str, Tensor] | None) -> Conditions:
    if conditions is None or isinstance(conditions, Mapping):
        bound, names = conditions, ()
    else:
        bound, names = None, tuple(conditions)
    tables = Conditions({**dict.fromkeys(names), **facts.conditions}, bound, null)
    if tables.count and facts.label_dim:
        raise ConfigError("a network with classes cannot have conditions bound as well: class_labels choose either")
    return tables


def _choose_bottleneck(model: Any, facts: NetworkFacts, asked: str | None) -> tuple[str | None, str]:
    """The module to tap, if any, and a word on it."""
    if asked != "auto":
        return asked, "none, as asked" if asked is None else f"{asked}, given"
    if facts.returns_bottleneck:
        return None, "returned by the network"
    name = taps.find(bare(model))
    return name, "none known: predictors read zeros" if name is None else f"{name}, found"


_WHOLE = "the network takes whole numbers: fractions are rounded to the nearest, the other coefficients stay exact"


def _notes(
    model: Any, facts: NetworkFacts, family: Family, why: str, tables: Conditions, bottleneck: str
) -> dict[str, str]:
    dtype = dtype_of(model)
    letters = ", ".join(facts.axes or "CHW")
    shape = f"not known: pass shape=({letters}) to Sampler" if facts.shape is None else str(tuple(facts.shape))
    if facts.shape is not None and facts.out_channels == 2 * facts.shape[facts.channel_axis]:
        shape += ", learned variances cut off"
    numbers = {"float": "none; a number per sample (B,)", "vector": f"none; {facts.label_dim} numbers per sample"}
    classes = numbers.get(facts.labels, f"{facts.label_dim}") if facts.label_dim else "none"
    none = "" if facts.null_class is None else f", {facts.null_class} meaning no class"
    bound = f", {tables.count} bound" if tables.count else ", given in each call" if tables.names else ""
    return {
        "network": type(bare(model)).__name__,
        "predicts": f"{family.describe()} ({why})",
        **({"time": _WHOLE} if facts.whole_times else {}),
        "sigma": f"{family.sigma_min:.4g} to {family.sigma_max:.4g}",
        "samples": shape,
        "classes": classes + none,
        "conditions": (", ".join(tables.names) or "none") + bound + (", with null" if tables.has_null else ""),
        "bottleneck": bottleneck,
        "precision": _precision(model, dtype),
    }


def _precision(model: Any, dtype: torch.dtype | None) -> str:
    if (compiled := compiled_of(model)) is not None:
        return f"network {compiled.describe()}, state x's"
    return "x's" if dtype is None else f"network {dtype}, state x's".replace("torch.", "")


@torch.no_grad()
def _check_not_noise(adapter: Adapter) -> None:
    """One evaluation of noise at the highest level: v is then nearly the data, and nearly independent of its input."""
    shape, ready = adapter.sample_shape, adapter.conditions.count or not adapter.conditions.names
    device, module = device_of(adapter.network), module_of(adapter.network)
    empty = module is not None and any(parameter.device.type == "meta" for parameter in module.parameters())
    if shape is None or not ready or empty or not math.isfinite(adapter.sigma_max):
        return
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((2, *shape), generator=generator, dtype=torch.float32, device="cpu").to(device)
    sigma = noise.new_full((2,), float(adapter.sigma_max))
    labels = torch.zeros(2, dtype=torch.int64, device=device) if adapter.label_dim else None
    c = adapter.family(sigma)
    with modes_kept(module):
        denoised = adapter(spread(1 / c.scale, noise) * noise, sigma, labels).x0
    raw = (denoised - spread(c.skip / c.scale, noise) * noise) / spread(c.out, noise)
    correlation = torch.nn.functional.cosine_similarity(raw.flatten(), noise.flatten(), dim=0)
    if correlation > NOISE_LIKE:
        raise ConfigError(
            f"prediction='v' was asked for, but at sigma={adapter.sigma_max:.3g} the network returns its noisy input "
            f"(correlation {correlation:.2f}): it predicts the noise; use prediction='epsilon', or verify=False"
        )
