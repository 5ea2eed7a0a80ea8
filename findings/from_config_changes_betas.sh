#!/usr/bin/env bash
# Changing the solver by from_config changes the betas, if they were defaults.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: HeunDiscreteScheduler.from_config(scheduler.config) is the documented way to change the solver and
#   keep the noise process of the model.
# Seen: From DDIMScheduler() the betas become 0.00085 to 0.012 instead of 0.0001 to 0.02, and the last
#   alphas_cumprod 1.6e-3 instead of 4.0e-5; KDPM2DiscreteScheduler does the same. from_config drops the
#   values that the first scheduler had by default, and fills in the defaults of the second, which are others.
#   If the first scheduler was given the same betas as arguments, or was loaded from a file that states them,
#   they are kept.
# Why it matters: Whoever trained with a scheduler made in code, by its defaults, samples another process
#   after the change: noise levels start at 25 instead of 157, and every timestep stands for another level
#   than in training. scheduler.config shows the right numbers in the first object.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler

silent, stated = DDIMScheduler(), DDIMScheduler(beta_start=0.0001, beta_end=0.02)
assert torch.equal(silent.betas, stated.betas)
for other in (HeunDiscreteScheduler, KDPM2DiscreteScheduler, EulerDiscreteScheduler):
    of_silent, of_stated = other.from_config(silent.config), other.from_config(stated.config)
    print(other.__name__, "of defaults:", of_silent.config.beta_start, of_silent.config.beta_end, end=" | ")
    print("of the same betas as arguments:", of_stated.config.beta_start, of_stated.config.beta_end)
    assert torch.equal(of_stated.betas, silent.betas)
    assert torch.equal(of_silent.betas, silent.betas) == (other is EulerDiscreteScheduler)
heun = HeunDiscreteScheduler.from_config(silent.config)
print("last alphas_cumprod:", float(heun.alphas_cumprod[-1]), "instead of", float(silent.alphas_cumprod[-1]))
assert heun.alphas_cumprod[-1] > 30 * silent.alphas_cumprod[-1]
PYTHON
