"""What a model of diffusers is told beside the noise level: classes, or the embeddings of prompts, with guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.adapters.facts import NetworkFacts
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, Denoiser, bind_labels

Ask = Callable[[Tensor, Tensor, dict[str, Tensor]], Denoised]


class Conditions(NamedTuple):
    """The model's further arguments by name, a row each per image, and the rows that mean "none" where it is guided.

    scale: of classifier-free guidance D_u + scale (D_c - D_u), None for none.
    """

    told: dict[str, Tensor]
    none: dict[str, Tensor]
    scale: float | None = None

    @property
    def rows(self) -> int | None:
        """How many images they are for; None where there are none."""
        return next((len(value) for value in self.told.values()), None)

    def expand(self, batch: int) -> Conditions:
        """For so many images. One row is for all; raises ConfigError for another number."""
        if self.rows not in (None, 1, batch):
            raise ConfigError(f"got {self.rows} prompts or class_labels for {batch} images; pass one, or one per image")
        told, none = ({name: _repeated(rows, batch) for name, rows in table.items()} for table in self[:2])
        return Conditions(told, none, self.scale)

    def select(self, indices: list[int]) -> Conditions:
        """These rows."""
        told, none = ({name: rows[indices] for name, rows in table.items()} for table in self[:2])
        return Conditions(told, none, self.scale)

    def to(self, device: torch.device) -> Conditions:
        told, none = ({name: rows.to(device) for name, rows in table.items()} for table in self[:2])
        return Conditions(told, none, self.scale)

    def bind(self, ask: Ask) -> Denoiser:
        """The denoiser (x, sigma) of a model (x, sigma, arguments) that is told these; features are the guided half's."""
        if not self.told:
            return lambda x, sigma: ask(x, sigma, {})
        on = torch.ones(self.rows or 0, 1, device=next(iter(self.told.values())).device)

        def network(x: Tensor, sigma: Tensor, on: Tensor) -> Denoised:
            return ask(x, sigma, {name: self._chosen(name, on) for name in self.told})

        return bind_labels(network, on, self.scale)

    def _chosen(self, name: str, on: Tensor) -> Tensor:
        """A row for each of `on` (B, 1): what is told, and "none" where that is zero."""
        told = _repeated(self.told[name], len(on))
        if self.scale is None:
            return told
        return torch.where(on.reshape(-1, *[1] * (told.dim() - 1)) != 0, told, _repeated(self.none[name], len(on)))


def _repeated(rows: Tensor, batch: int) -> Tensor:
    return rows.repeat(batch // len(rows), *[1] * (rows.dim() - 1))


def check_guidance(scale: Any) -> float | None:
    """The strength of guidance, None for none. Raises ConfigError."""
    if scale is None or scale == 1:  # D_u + 1 (D_c - D_u) = D_c
        return None
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 1 < scale < math.inf:
        raise ConfigError(
            f"guidance_scale must be a number of at least 1, or None for no guidance, got {scale!r}: below 1, diffusers "
            "means no guidance by it, and the formula less than the condition alone"
        )
    return float(scale)


def check_asked(facts: NetworkFacts, labels: bool, texts: bool, guided: bool) -> None:
    """Raise ConfigError where a model is told what it does not take, or not told what it needs."""
    needs = set(facts.conditions)
    if needs - {"encoder_hidden_states", "text_embeds", "time_ids"}:
        raise ConfigError(
            f"this model takes {', '.join(sorted(needs))}; AMEDPipeline tells what Stable Diffusion and SDXL take: sample it "
            "with amed_engine.adapters.wrap_pipeline and Sampler"
        )
    if labels and texts:
        raise ConfigError("pass prompts or class_labels, not both")
    if texts and facts.diffusers and not needs:
        raise ConfigError("a prompt was given, but this model takes none; leave it out")
    if labels and facts.diffusers and not facts.label_dim:
        raise ConfigError("class_labels were given, but this model has no classes; leave them out")
    if guided and not labels and not texts:
        raise ConfigError("guidance_scale needs class_labels, a prompt or prompt_embeds; this is of nothing")
    if not texts and needs:
        raise ConfigError("this model needs a prompt or prompt_embeds")
    if not labels and facts.label_dim:
        raise ConfigError(f"this model has {facts.label_dim} classes: pass class_labels")


def of_classes(
    labels: int | Sequence[int] | Tensor, count: int, null_class: int | None, scale: float | None
) -> Conditions:
    """Class labels as conditions. count: the classes that the model has, 0 where it does not say. Raises ConfigError."""
    labels = torch.as_tensor(labels, device=getattr(labels, "device", "cpu")).reshape(-1)
    known = labels if labels.device.type == "cpu" else labels[:0]  # others are not waited for
    if labels.is_floating_point() or (count and bool(((known < 0) | (known >= count)).any())):
        known_range = f" in 0 .. {count - 1}" if count else ""
        raise ConfigError(f"class_labels must be integers{known_range}, got {labels.tolist()}")
    if scale is None:
        return Conditions({"class_labels": labels}, {})
    if null_class is None:
        raise ConfigError(
            "guidance needs the class that means none: AMEDPipeline(..., null_class=...), to which training dropped labels"
        )
    return Conditions({"class_labels": labels}, {"class_labels": torch.full_like(labels, null_class)}, scale)


def of_prompts(embeds: Tensor, negative: Tensor | None, width: int | None, scale: float | None) -> Conditions:
    """Embeddings of prompts (B, L, D), and of what guidance leads away from, as conditions. Raises ConfigError."""
    if embeds.dim() != 3 or width not in (None, embeds.shape[-1]):
        raise ConfigError(
            f"prompt_embeds must have shape (B, L, {width or 'D'}), as this model takes, got {tuple(embeds.shape)}"
        )
    if scale is None:
        return Conditions({"encoder_hidden_states": embeds}, {})
    if negative is None:
        raise ConfigError("guidance away from prompt_embeds needs negative_prompt_embeds of the same shape")
    if negative.shape != embeds.shape:
        raise ConfigError(
            f"negative_prompt_embeds must have the shape of prompt_embeds {tuple(embeds.shape)}, got {tuple(negative.shape)}"
        )
    return Conditions({"encoder_hidden_states": embeds}, {"encoder_hidden_states": negative.to(embeds)}, scale)


def with_pooled(texts: Conditions, ids: Tensor, pooled: Tensor, negative: Tensor | None) -> Conditions:
    """SDXL's: with the pooled embeddings (B, P) of prompts and of what guidance leads away from, and ids (1, 6) of sizes."""
    rows = texts.rows or 0
    for name, value in {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative}.items():
        if value is not None and (value.dim() != 2 or len(value) != rows):
            raise ConfigError(f"{name} must have shape ({rows}, P), got {tuple(value.shape)}")
    sizes = ids.expand(rows, -1)
    told = texts.told | {"text_embeds": pooled, "time_ids": sizes}
    if texts.scale is None:
        return Conditions(told, {})
    if negative is None:
        raise ConfigError("guidance away from prompt_embeds needs negative_pooled_prompt_embeds beside the others")
    return Conditions(told, texts.none | {"text_embeds": negative, "time_ids": sizes}, texts.scale)
