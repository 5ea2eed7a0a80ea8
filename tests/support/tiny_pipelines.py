"""Pipelines of diffusers in miniature: every component of its own class, small and with random weights."""

import string

import diffusers
import torch
import transformers


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    ).eval()  # fmt: skip


def clip(kind=transformers.CLIPTextModel):
    """CLIP in miniature, (text encoder, tokenizer)."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=52, eos_token_id=53, projection_dim=12,
    )  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    return kind(config).eval(), tokenizer


def t5():
    """T5 in miniature, (text encoder, tokenizer)."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=40, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    words = [(letter, -3.0) for letter in string.ascii_lowercase]
    tokenizer = transformers.T5Tokenizer(vocab=special + words, extra_ids=0, model_max_length=8)
    return transformers.T5EncoderModel(config).eval(), tokenizer


def autoencoder(**options):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, scaling_factor=0.3, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    ).eval()  # fmt: skip


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion():
    text_encoder, tokenizer = clip()
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
    )
    made = diffusers.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return quiet(made)


def stable_diffusion_3():
    """Without T5, as it is often loaded; its two CLIPs are one."""
    text_encoder, tokenizer = clip(transformers.CLIPTextModelWithProjection)
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=24, pos_embed_max_size=8,
    )  # fmt: skip
    made = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(),
        text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder, tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    return quiet(made)


def make_flux(guidance_embeds=True):
    """Told a guidance or not, with the shift of the published one."""
    (text_encoder, tokenizer), (text_encoder_2, tokenizer_2) = clip(), t5()
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    made = diffusers.FluxPipeline(
        scheduler=scheduler, vae=autoencoder(shift_factor=0.1), text_encoder=text_encoder, tokenizer=tokenizer,
        text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, transformer=transformer.eval(),
    )  # fmt: skip
    return quiet(made)
