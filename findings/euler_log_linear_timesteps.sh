#!/usr/bin/env bash
# Log-linear levels are told to the network as the timesteps of other levels.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: interpolation_type="log_linear" chooses other noise levels, and tells the network the timestep
#   that each level had in training, as use_karras_sigmas=True does.
# Seen: Of 10 steps the fifth is taken at sigma 3.30 and the network is told timestep 555, which in training
#   belonged to sigma 4.70; the ninth at 0.069 with the timestep of 0.380. The levels are replaced, the
#   timesteps stay those of linear interpolation. Also there are 12 levels for 10 steps, one too many: the
#   last step ends at sigma 0.01 and never reaches the 0 behind it.
# Why it matters: The network removes noise for another level than the latent has: up to 5.5 times too much.
#   Nothing fails; images only get worse, and the schedule is blamed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import EulerDiscreteScheduler


def mismatch(**settings):
    """Level in training of the timestep that the network is told, over the level that the latent has."""
    scheduler = EulerDiscreteScheduler(**settings)
    training = scheduler.sigmas[:-1].flip(0)
    scheduler.set_timesteps(10)
    told = training[scheduler.timesteps.round().long()]
    print(len(scheduler.timesteps), "timesteps,", len(scheduler.sigmas), "levels")
    assert len(scheduler.sigmas) == (12 if settings == {"interpolation_type": "log_linear"} else 11)
    for timestep, sigma, trained in zip(scheduler.timesteps, scheduler.sigmas, told):
        print(f"timestep {timestep:5.0f}  sigma {sigma:8.3f}  in training {trained:8.3f}")
    return told / scheduler.sigmas[: len(told)]


print("log_linear")
log_linear = mismatch(interpolation_type="log_linear")
print("karras")
karras = mismatch(use_karras_sigmas=True)
assert abs(log_linear[4] - 4.703 / 3.298) < 0.01
assert log_linear.max() > 5
assert (karras - 1).abs()[:-1].max() < 0.05
PYTHON
