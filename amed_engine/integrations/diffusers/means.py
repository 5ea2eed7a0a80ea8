"""The mean answer that each image of a pipeline starts about: of its class, as a plan has it, or of its prompt, measured."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor

from amed_engine.engine.measure import paired_latents
from amed_engine.errors import ConfigError
from amed_engine.integrations.diffusers.conditions import Ask, Conditions
from amed_engine.sampling.denoiser import mean_of_labels, one_hot
from amed_engine.solvers.mean import Mean

KEPT = 64  # prompts


def mean_of_classes(mean: Mean | None, conditions: Conditions) -> Tensor:
    """A row for each class label, guided as the images are, (1 or B, C, H, W); without labels that of no class.

    Raises ConfigError for a class that the plan's mean answers do not know.
    """
    if mean is None:
        raise ConfigError("this plan's mean answer is yet to be measured; pass a predictor that was saved with its own")
    labels = conditions.told.get("class_labels")
    rows = mean.rows()
    if labels is None:
        return rows[:1]
    if bool((labels >= mean.classes).any()):
        raise ConfigError(
            f"this predictor's plan has mean answers for {mean.classes} classes, got class {int(labels.max())}; pass a "
            "predictor of this model"
        )
    rows = rows.to(labels.device)
    return mean_of_labels(rows, one_hot(labels, mean.classes, rows), conditions.scale)


class PromptMeans:
    """Mean answers to prompts: the network's to one latent, always the same, at the highest noise level, under guidance.

    The last are remembered by the content of what the network is told, as long as its parameters stay what they are.
    """

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}
        self._network: Any = None
        self._versions: list[tuple[int, torch.dtype]] = []

    def of(self, conditions: Conditions, ask: Ask, network: Any, sigma: float, like: Tensor) -> Tensor:
        """(R, C, H, W) for the R rows of conditions: one evaluation for each that is new. like: latents (B, C, H, W)."""
        self._forget_others(network)
        x = paired_latents(1, like.shape[1:]).to(like) * sigma
        keys = [_key(conditions, row, sigma, x) for row in range(conditions.rows or 0)]
        new = {key: row for row, key in enumerate(keys) if key not in self._known}
        found = {key: self._known[key] for key in keys if key in self._known}
        if new:
            denoiser = conditions.select(list(new.values())).bind(ask)
            answers = denoiser(x.expand(len(new), *x.shape[1:]), x.new_full((len(new),), sigma))[0]
            if not bool(answers.isfinite().all()):
                raise ConfigError(f"the model's answers to these prompts at sigma {sigma:g} are not finite")
            found |= dict(zip(new, answers, strict=True))
        earlier = {key: mean for key, mean in self._known.items() if key not in found}
        self._known = dict(list({**earlier, **found}.items())[-KEPT:])
        return torch.stack([found[key].to(like) for key in keys])

    def _forget_others(self, network: Any) -> None:
        parameters = getattr(network, "parameters", tuple)()
        versions = [(parameter._version, parameter.dtype) for parameter in parameters]
        if self._network is None or self._network() is not network or versions != self._versions:
            self._known, self._network, self._versions = {}, weakref.ref(network), versions


def _key(conditions: Conditions, row: int, sigma: float, x: Tensor) -> str:
    """What decides the answer for this row, digested."""
    digest = hashlib.sha256(f"{conditions.scale};{sigma};{tuple(x.shape)};{x.dtype}".encode())
    for table in (conditions.told, conditions.none):
        for name, rows in sorted(table.items()):
            digest.update(f";{name}:{tuple(rows.shape[1:])}:".encode())
            digest.update(rows[row].detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()
