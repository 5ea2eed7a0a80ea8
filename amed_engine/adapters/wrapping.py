"""`wrap`: any network as a denoiser, with what is not said inferred, checked and explained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters import taps
from amed_engine.adapters.adapter import Adapter
from amed_engine.adapters.choosing import Wanted, choose_family
from amed_engine.adapters.compiled import check_size
from amed_engine.adapters.conditions import Conditions
from amed_engine.adapters.facts import NetworkFacts, check_classes_known, check_known, facts_of
from amed_engine.adapters.family import Family
from amed_engine.adapters.flux import Flux
from amed_engine.adapters.karras import Denoising
from amed_engine.adapters.labels import check_kind
from amed_engine.adapters.lookups import TableError
from amed_engine.adapters.notes import notes_of
from amed_engine.adapters.schedulers import told_by
from amed_engine.adapters.verify import verify_adapter
from amed_engine.errors import ConfigError
from amed_engine.sampling.modes import plain_tensors
from amed_engine.sampling.modules import as_module, bare, said


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
    steps: str | None = None,
    levels: Any = None,
    conditions: Mapping[str, Tensor] | Iterable[str] | None = None,
    null_conditions: Mapping[str, Tensor] | None = None,
    verify: bool = True,
) -> Adapter:
    """A denoiser (x, sigma (B,)[, class_labels]) -> Denoised(D, bottleneck) from a raw network, ready for `Sampler`.

    model: (x_in, time[, labels], **conditions) -> prediction: a U-Net of `amed_engine.networks`, a U-Net or transformer of
        diffusers, one of guided-diffusion, or any other callable; noise level and classes go where its signature has them.
    prediction: what it predicts: "epsilon", "v" or "x0" (trained on discrete steps), "flow", "edm", "cm", "vp", "ve",
        "iddpm", "score", "denoised", "consistency" (a sample), or a `Family` of your own options. None asks the scheduler,
        then the network.
    scheduler: the diffusers scheduler it was trained with, for prediction, betas and range: D is the scheduler's own. One
        that is not known is refused, and by its name whatever of its configuration would change D otherwise.
    betas: of the discrete steps: "scaled_linear", "linear", "cosine", or alphas_cumprod as a tensor; beside a scheduler that
        has its own, they must be the same. steps: "integer" tells such a network the nearest step, int64, in place of a
        fraction. levels: noise levels (L,) of a score network that is told the index of one, int64.
    bottleneck: dotted name of the module whose output (B, C, h, w) a predictor reads; "auto" knows the published U-Nets, None
        is none, for which predictors read zeros.
    shape: of a sample, where the network does not tell: (C, L), (C, H, W), or (C, F, H, W), as the network takes it.
    label_dim: its number of classes, or of numbers per sample. labels: what reaches the network: classes as one-hot "rows"
        (B, label_dim), zeros for no class, or as an "index" (B,); or continuous conditions, one "float" per sample (B,) or a
        "vector" (B, label_dim). None is what the network says, else rows, or an index where the look finds that rows are
        refused. null_class: the index that means no class.
    conditions: tables by name, e.g. {"encoder_hidden_states": (P, L, D)}: P prompts, chosen by class_labels; or names alone,
        the tensors being given in each call. null_conditions: the same with one row, for classifier-free guidance.
    verify: look at the answers to 16 latents at most, at sigma_max, a third of it and near the data: numbers that are not
        finite, another shape, a network as "v" that predicts the noise raise; what is no denoiser of that kind is logged.
    Raises ConfigError for whatever cannot work, before any sampling. `print(denoiser)` shows what was inferred, and why.
    """
    _check_callable(model)
    model = as_module(model)
    model = Flux(model) if "FluxTransformer2DModel" in (kind.__name__ for kind in type(bare(model)).__mro__) else model
    check_known(model)
    label_dim = 1 if labels == "float" and label_dim is None else label_dim
    if label_dim is None:
        check_classes_known(model)
    facts = _with_classes(_with_shape(facts_of(model), check_size(model, shape)), label_dim, null_class, labels)
    told = None if scheduler is None else told_by(scheduler)
    family, why = choose_family(Wanted(prediction, scheduler, betas, steps, levels), facts, told)
    facts = replace(facts, whole_times=True) if steps == "integer" else facts
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
    notes = notes_of(model, facts, family, why, tables, found)
    if facts.denoises:  # a denoiser's own range of noise levels
        family.sigma_min = float(said(model, "sigma_min", 0) or family.sigma_min)
        family.sigma_max = float(said(model, "sigma_max", 0) or family.sigma_max)
    if not verify:
        adapter = Adapter(model, family, facts, tables, name, notes, found=bottleneck == "auto")
        adapter.looked_at = True
        return adapter
    try:
        return verify_adapter(Adapter(model, family, facts, tables, name, notes, found=bottleneck == "auto"))
    except TableError:
        if labels is not None or not facts.label_dim or facts.labels != "rows":
            raise
    facts, notes["classes"] = replace(facts, labels="index"), f"{facts.label_dim}, told as an index: rows were refused"
    return verify_adapter(Adapter(model, family, facts, tables, name, notes, found=bottleneck == "auto"))


def _check_callable(model: Any) -> None:
    if isinstance(bare(model), Adapter):
        raise ConfigError("this is what wrap returns already: pass it to Sampler")
    if isinstance(model, (str, os.PathLike)):
        raise ConfigError(
            f"model must be a network, got the path {os.fspath(model)!r}; open it first: amed_engine.adapters.load_onnx(path), "
            "load_compiled(path), torch.jit.load(path), or torch.export.load(path).module()"
        )
    if not callable(model):
        raise ConfigError(
            f"model must be a network or another callable (x, t) -> prediction, got {type(model).__name__}"
        )


def _with_shape(facts: NetworkFacts, shape: Any) -> NetworkFacts:
    """The facts with the caller's shape; contradictions raise."""
    if shape is None:
        return facts
    if len(facts.axes or facts.shape or shape) != len(shape):
        raise ConfigError(f"the network takes samples ({facts.rank}), got shape={tuple(shape)}; pass one of its rank")
    if facts.in_channels not in (None, shape[facts.channel_axis]):
        raise ConfigError(
            f"the network takes {facts.in_channels} channels, got shape={tuple(shape)}; samples must match it"
        )
    return replace(facts, shape=tuple(shape))


def _with_classes(facts: NetworkFacts, label_dim: Any, null_class: Any, labels: Any) -> NetworkFacts:
    """The facts with what the caller says of classes; contradictions raise."""
    if label_dim is not None:
        if not _is_count(label_dim):
            raise ConfigError(f"label_dim must be the number of classes, 0 for none, got {label_dim!r}")
        if facts.label_dim not in (0, label_dim):
            raise ConfigError(f"the network has {facts.label_dim} classes, got label_dim={label_dim}")
        facts = replace(facts, label_dim=label_dim)
    if null_class is not None:
        _check_null(null_class, labels or facts.labels, facts.label_dim, given=labels is not None)
        facts = replace(facts, null_class=int(null_class), labels="index")
    if labels is None:
        return facts
    check_kind(labels, facts.label_dim, facts.null_class)
    if facts.diffusers and labels != facts.labels:
        raise ConfigError(f"the network takes its labels as {facts.labels!r}, got labels={labels!r}; leave it out")
    return replace(facts, labels=labels)


def _check_null(null_class: Any, kind: str, label_dim: int, *, given: bool) -> None:
    """Raise ConfigError for what is no class, or none of a network that is told its classes by number."""
    if not label_dim:
        raise ConfigError(f"null_class={null_class} was given for a network without classes")
    if kind != "rows" or given:
        check_kind(kind, label_dim, null_class)
    if kind == "rows" and given:
        raise ConfigError(
            f'null_class={null_class} is an index, and labels="rows" say it by zeros; leave one of them out'
        )
    if not _is_count(null_class) or null_class > label_dim:
        raise ConfigError(
            f"null_class must be the index that means no class, 0 .. {label_dim} of {label_dim} classes (by custom the last, a "
            f"row more in the network's table), got {null_class!r}"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


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
