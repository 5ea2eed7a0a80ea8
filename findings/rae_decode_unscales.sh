#!/usr/bin/env bash
# AutoencoderRAE scales its latents itself, by the fields that tell everybody else to do it.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1, transformers 5.24.0; Python 3.11, CPU
# Expected: config.scaling_factor, latents_mean and latents_std of an autoencoder say what a sampler does to latents
#   before vae.decode: z / scaling_factor for AutoencoderKL, z * latents_std + latents_mean for those of videos.
# Seen: AutoencoderRAE has the same three fields, and its encode and decode apply them. Decoded as it is, a latent scaled
#   by 2 gives the image of the unscaled one; divided by scaling_factor first, as for AutoencoderKL, it gives another,
#   0.14 away. The same holds for latents_mean and latents_std.
# Why it matters: Code that decodes any autoencoder by its configuration undoes the scale twice, without an error: the
#   images look plausible and are wrong. Whether to scale is a matter of the class, which no field says.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import AutoencoderKL, AutoencoderRAE


def rae(**scale):
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = {f"decoder_{name}": value for name, value in small.items()}
    encoder = {"encoder_type": "mae", "encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_input_size": 16}
    return AutoencoderRAE(**encoder, encoder_num_hidden_layers=1, **decoder, patch_size=4, **scale).eval()


def kl(**scale):
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(32,), latent_channels=4, **scale).eval()


def image(vae, z):
    with torch.no_grad():
        return vae.decode(z, return_dict=False)[0]


torch.manual_seed(1)
z = {rae: torch.randn(1, 64, 4, 4), kl: torch.randn(1, 4, 4, 4)}
for make in (kl, rae):
    plain, scaled = make(scaling_factor=1.0), make(scaling_factor=2.0)
    truth = image(plain, z[make])
    as_it_is = (image(scaled, 2 * z[make]) - truth).abs().max().item()
    divided = (image(scaled, 2 * z[make] / scaled.config.scaling_factor) - truth).abs().max().item()
    print(f"{type(scaled).__name__}: off by {as_it_is:.4f} decoded as it is, by {divided:.4f} divided first")
    assert (as_it_is < 1e-5) == (make is rae)
    assert (divided < 1e-5) == (make is kl)
mean, std = torch.full((64, 1, 1), 0.5), torch.full((64, 1, 1), 2.0)
normalized = rae(latents_mean=mean.tolist(), latents_std=std.tolist())
off = (image(normalized, (z[rae] - mean) / std) - image(rae(), z[rae])).abs().max().item()
print(f"AutoencoderRAE with latents_mean and latents_std: off by {off:.1e} decoded as it is")
assert off < 1e-4
PYTHON
