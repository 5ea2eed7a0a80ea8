"""Which input and output of an ONNX model is what: by the names that exporters give them, where these are silent by shape."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from amed_engine.errors import ConfigError

FLOATS = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
}
TYPES = {**FLOATS, "tensor(int32)": "int32", "tensor(int64)": "int64"}

SAMPLES = ("x", "x_t", "xt", "x_in", "sample", "noisy", "noisy_sample", "noisy_latents", "latent", "latents")
SAMPLES += ("latent_model_input", "latent_sample", "hidden_states", "input")
STEPS = ("timestep", "timesteps", "time_step")  # told to raw networks alone
TIMES = (*STEPS, "t", "time", "times", "step", "steps", "sigma", "sigmas", "noise_level", "noise_levels")
TIMES += ("noise_labels", "c_noise")
LABELS = ("class_labels", "class_label", "labels", "label", "classes", "y")
CONDITIONS = ("encoder_hidden_states", "context", "prompt_embeds", "text_embeds", "time_ids", "pooled_projections")
CONDITIONS += ("image_embeds", "timestep_cond", "attention_mask", "encoder_attention_mask")
RAW = ("noise_pred", "out_sample", "eps", "epsilon", "v_pred", "velocity")  # answers of raw networks alone
ANSWERS = ("denoised", *RAW, "sample", "prediction", "model_output", "output")

_SAY = "load_onnx(path, inputs=(sample, time[, labels]))"


class Roles(NamedTuple):
    """The inputs of a model: sample, time, labels where there are any, and conditions by name."""

    x: Any
    time: Any
    labels: Any
    conditions: tuple[Any, ...]


def roles_of(entries: Sequence[Any], answer: Any, path: str | os.PathLike, told: Sequence[str] | None = None) -> Roles:
    """entries: onnxruntime's inputs, with name, type and shape; answer: its prediction. told: the names of the sample, the time
    and perhaps the labels. Raises ConfigError for inputs that are not known, or could be several things.
    """
    _check_types(entries, path)
    if told is None:
        x = _sample(entries, answer, path)
        time = _time([entry for entry in entries if entry is not x], path)
        rest = [entry for entry in entries if entry is not x and entry is not time]
        labels = _labels(rest)
    else:
        x, time, labels = _named(entries, told, path)
    rest = [entry for entry in entries if not any(entry is each for each in (x, time, labels))]
    if labels is not None and rest and told is None:  # conditions are tables of whole rows, the class among them
        rest, labels = [entry for entry in entries if entry is labels or entry in rest], None
    _check_rows((x, *rest, *([] if labels is None else [labels])), path)
    return Roles(x, time, labels, tuple(rest))


def describe(entries: Sequence[Any]) -> str:
    """Names, types and shapes: "sample float16 (batch, 4, 64, 64), timestep int64 ()"."""
    return ", ".join(
        f"{e.name} {TYPES.get(e.type, e.type.removeprefix('tensor(').removesuffix(')'))} ({', '.join(map(str, e.shape or ()))})"
        for e in entries
    )


def _check_types(entries: Sequence[Any], path: str | os.PathLike) -> None:
    for entry in entries:
        if entry.type not in TYPES:
            raise ConfigError(
                f"{path}: its input {describe([entry])} must be one of {', '.join(TYPES.values())}, the types that are "
                "handed to ONNX models; export it with one of them"
            )
    if len(entries) < 2:
        raise ConfigError(
            f"{path} has inputs {describe(entries)}; expected x (B, ...), sigma or a time (B,), and perhaps labels"
        )


def _sample(entries: Sequence[Any], answer: Any, path: str | os.PathLike) -> Any:
    known = [e for e in entries if _is(e, SAMPLES)]
    if not known:
        known = [
            e for e in entries if e.type in FLOATS and not _is(e, (*TIMES, *LABELS, *CONDITIONS)) and _like(e, answer)
        ]
    return _only(known, "the sample", entries, path)


def _time(entries: Sequence[Any], path: str | os.PathLike) -> Any:
    known = [e for e in entries if _is(e, TIMES)]
    if not known:
        known = [e for e in entries if not _is(e, (*LABELS, *CONDITIONS)) and _is_number(e)]
    return _only(known, "the noise level or step", entries, path)


def _labels(entries: Sequence[Any]) -> Any:
    """A class or numbers per sample; None where the rest are conditions."""
    known = [e for e in entries if _is(e, LABELS)]
    if not known and len(entries) == 1:
        known = [e for e in entries if not _is(e, CONDITIONS)]
    fitting = [e for e in known if _is_number(e) or (len(e.shape) == 2 and e.type in FLOATS)]
    return fitting[0] if len(fitting) == 1 else None


def _named(entries: Sequence[Any], told: Sequence[str], path: str | os.PathLike) -> tuple[Any, Any, Any]:
    known = {entry.name: entry for entry in entries}
    if isinstance(told, str) or len(told) not in (2, 3) or len(set(told)) != len(told) or not set(told) <= set(known):
        raise ConfigError(
            f"inputs must name the sample, the time and perhaps the labels of {path}, got {told!r}; it has {describe(entries)}"
        )
    x, time, *labels = (known[name] for name in told)
    return x, time, labels[0] if labels else None


def _check_rows(entries: Sequence[Any], path: str | os.PathLike) -> None:
    """Each has a row per sample; one of a fixed number of rows beside samples of any cannot be padded, cut or guided."""
    batch = entries[0].shape[0]
    for entry in entries[1:]:
        first = entry.shape[0] if entry.shape else None
        if first is None or (isinstance(first, int) and first != batch):
            raise ConfigError(
                f"{path}: its input {describe([entry])} has no row for each sample of {describe(entries[:1])}; export it with "
                "the batch as its first dimension"
            )


def _is(entry: Any, names: Sequence[str]) -> bool:
    return entry.name.lower() in names


def _is_number(entry: Any) -> bool:
    """One number per sample, or one for all: (), (1,), (B,), (B, 1)."""
    return all(size == 1 for size in (entry.shape or ())[1:])


def _like(entry: Any, answer: Any) -> bool:
    """Whether a sample and a prediction may have these shapes, of perhaps twice the channels."""
    if len(entry.shape or ()) < 2 or len(entry.shape) != len(answer.shape or ()):
        return False
    pairs = list(zip(entry.shape, answer.shape, strict=True))
    pairs[1] = (0, 0)
    return all(a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in pairs)


def _only(known: Sequence[Any], what: str, entries: Sequence[Any], path: str | os.PathLike) -> Any:
    if len(known) != 1:
        found = f"may be {describe(known)}" if known else f"is none of {describe(entries)} by name or shape"
        raise ConfigError(f"{path}: {what} {found}; expected x, sigma and perhaps labels; say which is which: {_SAY}")
    return known[0]
