#!/usr/bin/env bash
# Trailing timesteps are sometimes one too many, and the last is -1.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: set_timesteps(n) with timestep_spacing="trailing" gives n timesteps from 999 down, all of them
#   timesteps of training.
# Seen: For 62 of the step counts from 1 to 1000, 61 the first of them, it gives n + 1, and the last is -1:
#   numpy.arange(1000, 0, -1000 / 61) has 62 entries, because 61 steps of that float do not quite reach 0.
#   DDIMScheduler takes alphas_cumprod[-1], the noisiest of all, for the level of timestep -1: with an exact
#   denoiser the image is off by 140 after 61 steps and by less than 0.03 after 60 and 62.
# Why it matters: Trailing is the spacing that is recommended for few steps and zero terminal SNR. At unlucky
#   counts the network is evaluated once more, at a timestep that it was never trained on, and DDIM destroys
#   the finished image with it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import DDIMScheduler

image = torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)


def timesteps(count):
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(count)
    return scheduler.timesteps


def error(count):
    """Largest error of an image sampled with a denoiser that knows it; timestep -1 is answered as timestep 0."""
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(count)
    x = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[max(int(t), 0)]
        x = scheduler.step((x - alpha**0.5 * image) / (1 - alpha) ** 0.5, t, x).prev_sample
    return float((x - image).abs().max())


longer = [count for count in range(1, 1001) if len(timesteps(count)) != count]
print(len(longer), "counts are exceeded, the first are", longer[:5])
print("last timesteps of 61:", timesteps(61)[-2:].tolist())
print("errors of 60, 61 and 62 steps:", error(60), error(61), error(62))
assert len(longer) == 62 and longer[0] == 61
assert len(timesteps(61)) == 62 and timesteps(61)[-1] == -1
assert max(error(60), error(62)) < 0.1 and error(61) > 100
PYTHON
