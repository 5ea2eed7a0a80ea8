"""Prompts as the embeddings that a text-to-image model was trained with: CLIP's, in Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline  # type: ignore[attr-defined]
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from torch import Tensor

from amed_engine.adapters.facts import facts_of
from amed_engine.adapters.latents import encode_texts
from amed_engine.errors import ConfigError


class Prompts(NamedTuple):
    """What is asked for and what guidance leads away from, as text or as embeddings (P, L, D); pooled (P, D) and prompt_2 are
    SDXL's.
    """

    prompt: Any
    negative_prompt: Any
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    prompt_2: Any = None

    def encode(self, pipeline: Any, device: torch.device, guided: bool) -> tuple[Any, ...]:
        """Embeddings of both, as many, and of SDXL the pooled ones; without a negative prompt those of "", or None where there
        is no encoder. pipeline: with Stable Diffusion's components. Raises ConfigError.
        """
        self._check()
        pooled = "text_embeds" in facts_of(pipeline.unet).conditions
        if not pooled and any(given is not None for given in self[4:]):
            raise ConfigError("pooled embeddings and prompt_2 are for SDXL; leave them out")
        encoded = self._encode_xl(pipeline, device, guided) if pooled else self._encode(pipeline, device, guided)
        return tuple(None if rows is None else rows.to(device) for rows in encoded)

    def _check(self) -> None:
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ConfigError("pass either prompt or prompt_embeds")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ConfigError("pass negative_prompt or negative_prompt_embeds, not both")
        if self.prompt_embeds is None and self.pooled_prompt_embeds is not None:
            raise ConfigError("pooled_prompt_embeds belong to prompt_embeds; pass both, or neither")
        for embeds in self[2:6]:
            if embeds is not None and not isinstance(embeds, Tensor):
                raise ConfigError(f"embeddings of prompts must be tensors (P, L, D), got {type(embeds).__name__}")

    def _encode(self, pipeline: Any, device: torch.device, guided: bool) -> tuple[Tensor, Tensor | None]:
        encoders = pipeline.tokenizer, pipeline.text_encoder
        embeds, negative = self.prompt_embeds, self.negative_prompt_embeds
        if embeds is None:
            embeds = _encoded(*encoders, _texts("prompt", self.prompt), device)
        if not guided:
            return embeds, None
        if negative is None and (self.negative_prompt is not None or pipeline.text_encoder is not None):
            texts = _texts("negative_prompt", "" if self.negative_prompt is None else self.negative_prompt)
            negative = _encoded(*encoders, texts, device)
        return embeds, _as_many(negative, embeds)

    def _encode_xl(self, pipeline: Any, device: torch.device, guided: bool) -> tuple[Any, ...]:
        if self.prompt is None:
            if self.pooled_prompt_embeds is None:
                raise ConfigError("SDXL needs pooled_prompt_embeds beside prompt_embeds")
            embeds, pooled = self.prompt_embeds, self.pooled_prompt_embeds
            if not guided:
                return embeds, None, pooled, None
            negatives = self.negative_prompt_embeds, self.negative_pooled_prompt_embeds
            return embeds, _as_many(negatives[0], embeds), pooled, _as_many(negatives[1], pooled)
        if pipeline.text_encoder_2 is None or pipeline.tokenizer_2 is None:
            raise ConfigError(
                "prompts need SDXL's text_encoder_2 and tokenizer_2; build the pipeline with them, or pass embeddings"
            )
        prompts = _texts("prompt", self.prompt)
        negative = None if self.negative_prompt is None else _texts("negative_prompt", self.negative_prompt)
        # One text is against all prompts.
        negative = negative * len(prompts) if negative is not None and len(negative) == 1 else negative
        if negative is not None and len(negative) != len(prompts):
            raise ConfigError(f"got {len(negative)} negative prompts for {len(prompts)} prompts; pass one, or as many")
        return _xl(pipeline).encode_prompt(
            prompts,
            prompt_2=self.prompt_2,
            device=device,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
            negative_prompt_embeds=self.negative_prompt_embeds,
            negative_pooled_prompt_embeds=self.negative_pooled_prompt_embeds,
        )


def _xl(pipeline: Any) -> Any:
    """SDXL's own pipeline round these components, for its two encoders."""
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    zeros = pipeline.config["force_zeros_for_empty_prompt"]
    parts = {name: getattr(pipeline, name) for name in names}
    return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)


def _as_many(negative: Tensor | None, embeds: Tensor | None) -> Tensor | None:
    if negative is None or embeds is None or len(negative) != 1:
        return negative
    return negative.expand(len(embeds), *negative.shape[1:])


def _texts(name: str, prompt: Any) -> list[str]:
    """A prompt, or several, as a list. Raises ConfigError."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ConfigError(
            f"{name} must be a text or a list of texts, got {prompt!r}; a number of images is batch_size="
        )
    return list(prompts)


def _encoded(tokenizer: Any, text_encoder: Any, prompts: list[str], device: torch.device) -> Tensor:
    if tokenizer is None or text_encoder is None:
        raise ConfigError(
            "prompts need the pipeline's tokenizer and text_encoder; build it with both, or pass prompt_embeds"
        )
    # A word of textual inversion may stand for several tokens.
    words: Any = TextualInversionLoaderMixin().maybe_convert_prompt(prompts, tokenizer)
    return encode_texts(tokenizer, text_encoder, words, device)
