"""Latent diffusion: prompts of a diffusers pipeline as bound conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.adapter import Adapter
from amed_engine.adapters.autoencoders import check_latent_channels
from amed_engine.adapters.facts import facts_of
from amed_engine.adapters.flux import Flux
from amed_engine.adapters.wrapping import wrap
from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import bare, device_of

NETWORKS = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel")
# Of a pipeline's components those that the denoiser holds, and those that have no say in it.
COMPONENTS = {
    *("unet", "transformer", "scheduler", "vae", "predictor", "safety_checker", "feature_extractor", "image_encoder"),
    *(f"{kind}{number}" for kind in ("tokenizer", "text_encoder") for number in ("", "_2", "_3")),
}


@torch.no_grad()
def wrap_pipeline(
    pipeline: Any,
    prompts: str | Sequence[str],
    *,
    negative_prompt: str | None = None,
    shape: tuple[int, ...] | None = None,
    guidance: float | None = None,
    bottleneck: str | None = "auto",
) -> Adapter:
    """The denoiser of a text-to-image pipeline with its prompts bound; `class_labels` choose among them.

    pipeline: one of diffusers with an `encode_prompt` and a U-Net or MMDiT that `wrap` knows (Stable Diffusion, SDXL,
    Stable Diffusion 3, Flux). negative_prompt: what guidance leads away from; None is what the pipeline itself takes then: "",
    or zeros where SDXL has force_zeros_for_empty_prompt. shape: (C, H, W) of the latents, where it is not the network's own;
    SDXL is told its size. Prediction and betas are read from the pipeline's scheduler, the noise levels of a flow are
    `flow_levels(n, shift=shift_of(pipeline.scheduler, denoiser.sample_shape))`. Guidance is the sampler's:
    guidance_scale=7.5; guidance is what a Flux distilled for it is told instead, 3.5 unless given. bottleneck: as `wrap` has
    it; None for a network that is compiled already.
    Raises ConfigError for a pipeline of another kind, or a VAE with other latent channels than the network.
    """
    network, kind = _network_of(pipeline)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ConfigError("prompts are empty; pass a text or a list of them")
    is_flux = kind == "FluxTransformer2DModel"
    if guidance is not None and not is_flux:
        raise ConfigError(f"{kind} is not told a guidance; pass guidance_scale={guidance} to Sampler.run")
    channels = network.config.in_channels // (4 if is_flux else 1)
    vae = getattr(pipeline, "vae", None)
    if vae is not None:
        check_latent_channels(vae, channels, "the network takes")
    if is_flux:
        size = pipeline.default_sample_size  # the transformer itself takes any
        conditions, null = _encode_flux(pipeline, network, prompts, negative_prompt)
        network, shape = Flux(network, 3.5 if guidance is None else guidance), shape or (channels, size, size)
    else:
        conditions, null = _encode(pipeline, network, prompts, negative_prompt, None if shape is None else shape[1:])
    return wrap(
        network,
        scheduler=pipeline.scheduler,
        conditions=conditions,
        null_conditions=null,
        shape=shape,
        bottleneck=bottleneck,
    )


def _network_of(pipeline: Any) -> tuple[Any, str]:
    """The network, and the class of diffusers that it is. Raises ConfigError for a pipeline of another kind."""
    given = [part for name in ("unet", "transformer") if (part := getattr(pipeline, name, None)) is not None]
    if not given or not hasattr(pipeline, "encode_prompt"):
        raise ConfigError(
            "pipeline must be a text-to-image pipeline of diffusers with a U-Net or a transformer, got "
            f"{type(pipeline).__name__}"
        )
    names = [ancestor.__name__ for ancestor in type(bare(given[0])).__mro__]
    known = [name for name in names if name in NETWORKS]
    if not known:
        raise ConfigError(
            f"{type(pipeline).__name__} has a {names[0]}, known are {', '.join(NETWORKS)}; wrap a function "
            "(x, t, **conditions) -> prediction that calls it, with conditions={...}"
        )
    _check_components(pipeline, given[0])
    return given[0], known[0]


def _check_components(pipeline: Any, network: Any) -> None:
    """Raise ConfigError for a part that its own call would ask, and the denoiser would not."""
    parts = getattr(pipeline, "components", {})
    if others := sorted(name for name, part in parts.items() if part is not None and name not in COMPONENTS):
        raise ConfigError(
            f"{type(pipeline).__name__} has {', '.join(others)}, which the denoiser would leave out; pass the text-to-image "
            "pipeline of the same network, such as StableDiffusionPipeline.from_pipe(pipeline), or wrap a function "
            "(x, t, **conditions) -> prediction that asks all of them"
        )
    if "image_embeds" in facts_of(network).conditions:
        raise ConfigError(
            "the network needs image_embeds, of an IP adapter, say, and is told texts alone here; call "
            "pipeline.unload_ip_adapter(), or wrap(pipeline.unet, conditions={...}) with image_embeds among them"
        )


def _encode(
    pipeline: Any, network: Any, prompts: list[str], negative: str | None, size: Sequence[int] | None
) -> tuple[dict, dict]:
    """The conditions of the prompts, a row each, and those of the negative prompt, one row. size: of the latents."""
    encoded = pipeline.encode_prompt(
        prompt=prompts,
        device=device_of(network),
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=None if negative is None else [negative] * len(prompts),
        **{f"prompt_{i}": None for i in (2, 3) if hasattr(pipeline, f"tokenizer_{i}")},
    )
    positive, negatives, *pooled = encoded
    conditions, null = {"encoder_hidden_states": positive}, {"encoder_hidden_states": negatives[:1]}
    if pooled:
        name = "pooled_projections" if type(bare(network)).__name__.startswith("SD3") else "text_embeds"
        conditions[name], null[name] = pooled[0], pooled[1][:1]
    if "text_embeds" in conditions:
        ids = time_ids(pipeline, network, pooled[0], size)
        conditions["time_ids"], null["time_ids"] = ids.expand(len(prompts), -1), ids
    return conditions, null


def _encode_flux(pipeline: Any, network: Any, prompts: list[str], negative: str | None) -> tuple[dict, dict]:
    """The same for Flux, whose encoder knows no negative prompts: they are prompts like any other."""
    text, pooled, _ = pipeline.encode_prompt([*prompts, negative or ""], device=device_of(network))
    rows = {"encoder_hidden_states": text, "pooled_projections": pooled}
    return {name: value[:-1] for name, value in rows.items()}, {name: value[-1:] for name, value in rows.items()}


def time_ids(pipeline: Any, network: Any, pooled: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """SDXL's original size, crop and target size, (1, 6): nothing cropped, all at the size of the image that is made.

    size: (H, W) of the latents, None for the network's own. Raises ConfigError for a network that is told other numbers, as
    the Refiner is, which is told an aesthetic score.
    """
    _check_told_sizes(network.config, pooled.shape[-1])
    own = network.config.sample_size or 128
    height, width = size or ((own, own) if isinstance(own, int) else own)
    pixels = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor)
    return torch.tensor([[*pixels, 0, 0, *pixels]], dtype=pooled.dtype, device=pooled.device)


def _check_told_sizes(config: Any, pooled: int) -> None:
    told, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    if told is not None and each and told != pooled + 6 * each:
        raise ConfigError(
            f"the network has projection_class_embeddings_input_dim={told}: beside a text of {pooled} it is told "
            f"{(told - pooled) / each:g} numbers of {each}, expected the 6 of SDXL's sizes; the Refiner, which is told an "
            "aesthetic score, takes wrap(network, conditions={...}) with time_ids of your own"
        )


@torch.no_grad()
def encode_texts(tokenizer: Any, text_encoder: Any, texts: list[str], device: torch.device) -> Tensor:
    """A CLIP encoder's last states (P, L, D), each text cut or padded to the tokenizer's length."""
    length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    tokens = tokenizer(texts, **length, return_tensors="pt")
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if masked else None
    return text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
