"""What a pipeline of diffusers is asked for each batch: its options as they are, prompts and classes by the labels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amed_engine.adapters.facts import facts_of
from amed_engine.errors import ConfigError

DECODED = ("pil", "np", "pt")
# What `Source.draw` says itself, or what would make a sample depend on its batch.
OWN = ("generator", "latents", "batch_size", "num_images_per_prompt", "return_dict", "class_labels", "guidance_scale")


@dataclass(frozen=True)
class Asked:
    """The arguments of a call. fixed: the same for all; rows: of each prompt, lists or tensors; choices: how many prompts or
    classes a label chooses from, 0 for none; latent: whether latents are wanted, and no pictures."""

    fixed: dict[str, Any]
    rows: dict[str, Any]
    choices: int
    latent: bool
    classes: bool

    def arguments(self, parameters: Any, count: int, labels: np.ndarray | None) -> dict[str, Any]:
        index = [0] * count if labels is None else labels.tolist()
        told = {name: _chosen(value, index) for name, value in self.rows.items()}
        if self.classes:
            told["class_labels"] = index
        if not self.rows and "batch_size" in parameters:
            told["batch_size"] = count
        return {**self.fixed, **told, "output_type": "latent" if self.latent else "np", "return_dict": False}

    def told(self) -> dict[str, Any]:
        """For people, and for comparison."""
        return {**self.fixed, **self.rows, "output_type": "latent" if self.latent else "decoded"}


def _chosen(value: Any, index: list[int]) -> Any:
    return value[index] if isinstance(value, Tensor) else [value[i] for i in index]


def parameters_of(pipeline: Any) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters


def ask(pipeline: Any, guidance_scale: Any, options: dict[str, Any]) -> Asked:
    """Check the options of a pipeline's calls. Raises ConfigError."""
    known, given = parameters_of(pipeline), dict(options)
    latent = _is_latent(given.pop("output_type", None))
    if guidance_scale is not None:
        given["guidance_scale"] = guidance_scale
    _check_known(pipeline, known, options, guidance_scale)
    rows = {name: value for name, value in given.items() if "prompt" in name and value is not None}
    fixed = {name: value for name, value in given.items() if name not in rows}
    for name, value in fixed.items():
        _check_plain(name, value)
    prompts = _prompts(rows)
    classes = 0 if rows or "class_labels" not in known else _classes(pipeline)
    if not prompts and not classes and "batch_size" not in known:
        raise ConfigError(
            f"{type(pipeline).__name__} draws from prompts: pass prompt=, one or a list of which labels choose"
        )
    rows = {name: _rows(name, value, prompts) for name, value in rows.items()}
    return Asked(fixed, rows, prompts or classes, latent, bool(classes))


def _is_latent(output_type: Any) -> bool:
    if output_type not in (None, "latent", *DECODED):
        raise ConfigError(
            f"output_type must be 'latent', or one of {', '.join(DECODED)} for pictures, got {output_type!r}"
        )
    return output_type == "latent"


def _check_known(pipeline: Any, known: Any, options: dict[str, Any], guidance_scale: Any) -> None:
    name = type(pipeline).__name__
    if "generator" not in known:
        raise ConfigError(f"{name} takes no generator, and a sample must come of its seed; use another pipeline")
    taken = [each for each in known if each not in OWN and each != "self" and not each.startswith("callback")]
    if guidance_scale is not None and "guidance_scale" not in known:
        raise ConfigError(f"{name} has no guidance, got guidance_scale={guidance_scale}; leave it out")
    for option in options:
        if option in OWN or option.startswith("callback"):
            raise ConfigError(
                f"{option} is not an option of a data set: seeds and labels decide each sample; leave it out"
            )
        if option not in taken and option != "output_type":
            raise ConfigError(f"{name} takes no {option}; its options are {', '.join(taken)}")


def _check_plain(name: str, value: Any) -> None:
    """What a manifest can tell: numbers, texts, tensors and collections of these."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for each in inner:
        _check_plain(name, each)
    if not isinstance(value, (str, int, float, bool, list, tuple, dict, Tensor, type(None))):
        raise ConfigError(
            f"{name} must be a number, a text, a tensor or a list of these, which a manifest can tell, got "
            f"{type(value).__name__}"
        )


def _prompts(rows: dict[str, Any]) -> int:
    """How many prompts there are: as many as the first list or tensor says, 1 for texts alone."""
    counts = {name: len(value) for name, value in rows.items() if isinstance(value, (list, tuple, Tensor))}
    if counts and (len(set(counts.values())) != 1 or not all(counts.values())):
        raise ConfigError(f"prompts must be as many of each kind, at least one, got {counts}; a text alone is for all")
    return next(iter(counts.values()), 1) if rows else 0


def _rows(name: str, value: Any, count: int) -> Sequence[str] | Tensor:
    if isinstance(value, Tensor):
        return value.detach().clone()
    texts = [value] * count if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"{name} must be a text, a list of texts or a tensor of embeddings, got {type(value).__name__}"
        )
    return texts


def _classes(pipeline: Any) -> int:
    """Of a class-conditional network; 0 for another."""
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    return 0 if network is None else facts_of(network).label_dim


def chosen_labels(labels: np.ndarray, choices: int, count: int, what: str) -> np.ndarray:
    """Numbers of prompts or classes, (count,) int64, one for all allowed. Raises ConfigError."""
    if not choices:
        raise ConfigError("labels were given, but this pipeline has neither classes nor prompts; leave them out")
    if labels.dtype.kind != "i" or labels.shape not in ((), (count,)):
        raise ConfigError(
            f"labels must be one integer or {count} of them, the numbers of {what}, got {labels.dtype} of shape {labels.shape}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < choices:
        bad = labels.max() if labels.max() >= choices else labels.min()
        raise ConfigError(f"labels must be in 0 .. {choices - 1}, the numbers of {what}, got {bad}")
    return np.broadcast_to(labels, (count,))


def defaults(parameters: Any) -> dict[str, Any]:
    """What a pipeline does where nobody says anything: its numbers and texts."""
    plain = ((name, each.default) for name, each in parameters.items() if name not in ("output_type", "return_dict"))
    return {name: value for name, value in plain if type(value) in (bool, int, float, str)}


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator for each sample, on the host: its noise is the same on every device and in every batch."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
