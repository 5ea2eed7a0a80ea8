#!/usr/bin/env bash
# Euler steps round a float32 latent to the dtype of the network's output.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: A float32 latent stays float32 through a step, whatever the precision of the network: so it does
#   in DDIM, DDPM, DPM-Solver++ and UniPC.
# Seen: EulerDiscreteScheduler returns bfloat16 from a float32 latent and a bfloat16 prediction: it computes
#   in float32 and rounds to the dtype of the prediction. EulerAncestralDiscreteScheduler does so too. From
#   the second step on the latent has 8 bits.
# Why it matters: Keeping the latent in float32 round a half-precision network is the usual care against
#   accumulated rounding. Here it is undone by the scheduler at every step, and a comparison of solvers in
#   bfloat16 compares dtypes of state.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

ROUNDS = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)
for scheduler_class in (*ROUNDS, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
    scheduler = scheduler_class()
    scheduler.set_timesteps(10)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prediction = scheduler.scale_model_input(x, scheduler.timesteps[0]).bfloat16()
    dtype = scheduler.step(prediction, scheduler.timesteps[0], x).prev_sample.dtype
    print(scheduler_class.__name__, dtype)
    assert dtype == (torch.bfloat16 if scheduler_class in ROUNDS else torch.float32)
PYTHON
