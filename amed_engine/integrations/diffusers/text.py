"""Prompts as the embeddings that a text-to-image model was trained with: CLIP's, in Stable Diffusion 1 and 2."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.adapters.latents import encode_texts
from amed_engine.errors import ConfigError


class Prompts(NamedTuple):
    """What is asked for and what guidance leads away from, each as text or as embeddings (P, L, D)."""

    prompt: Any
    negative_prompt: Any
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None

    def encode(
        self, tokenizer: Any, text_encoder: Any, device: torch.device, guided: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings of both, as many; without a negative prompt those of "", or None where there is no encoder."""
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ConfigError("pass either prompt or prompt_embeds")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ConfigError("pass negative_prompt or negative_prompt_embeds, not both")
        for embeds in (self.prompt_embeds, self.negative_prompt_embeds):
            if embeds is not None and not isinstance(embeds, Tensor):
                raise ConfigError(f"embeddings of prompts must be tensors (P, L, D), got {type(embeds).__name__}")
        embeds, negative = self.prompt_embeds, self.negative_prompt_embeds
        if embeds is None:
            embeds = _encode(tokenizer, text_encoder, _texts("prompt", self.prompt), device)
        if not guided:
            return embeds, None
        if negative is None and (self.negative_prompt is not None or text_encoder is not None):
            texts = _texts("negative_prompt", "" if self.negative_prompt is None else self.negative_prompt)
            negative = _encode(tokenizer, text_encoder, texts, device)
        if negative is not None and len(negative) == 1:
            negative = negative.expand(len(embeds), *negative.shape[1:])
        return embeds, negative


def _texts(name: str, prompt: Any) -> list[str]:
    """A prompt, or several, as a list. Raises ConfigError."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ConfigError(
            f"{name} must be a text or a list of texts, got {prompt!r}; a number of images is batch_size="
        )
    return list(prompts)


def _encode(tokenizer: Any, text_encoder: Any, prompts: list[str], device: torch.device) -> Tensor:
    if tokenizer is None or text_encoder is None:
        raise ConfigError(
            "prompts need the pipeline's tokenizer and text_encoder; build it with both, or pass prompt_embeds"
        )
    return encode_texts(tokenizer, text_encoder, prompts, device)
