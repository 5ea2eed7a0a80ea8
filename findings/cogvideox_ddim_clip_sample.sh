#!/usr/bin/env bash
# CogVideoXDDIMScheduler takes clip_sample=True and never clips.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: clip_sample=True, which is the default, clips the predicted x_0 to clip_sample_range, as the
#   docstring says and as DDIMScheduler does.
# Seen: x_0 has entries of 5.0 with clip_sample=True, and equals that of clip_sample=False bit for bit. The
#   setting is stored in the configuration and never read. DDIMScheduler with the same settings answers 1.0.
# Why it matters: A configuration that is read from one class into another of the DDIM family samples with
#   clipping in one and without in the other, and reports clip_sample: true in both.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler


def predicted(scheduler_class, clip):
    """x_0 of a step whose network predicts the constant 5."""
    scheduler = scheduler_class(clip_sample=clip, clip_sample_range=1.0, prediction_type="sample")
    scheduler.set_timesteps(10)
    assert scheduler.config.clip_sample is clip
    five = torch.full((1, 3, 4, 4), 5.0)
    return scheduler.step(five, scheduler.timesteps[5], torch.ones_like(five)).pred_original_sample


cogvideox, ddim = predicted(CogVideoXDDIMScheduler, True), predicted(DDIMScheduler, True)
print("largest entry of x_0: CogVideoXDDIMScheduler", float(cogvideox.max()), "| DDIMScheduler", float(ddim.max()))
assert ddim.max() == 1.0
assert cogvideox.max() == 5.0
assert torch.equal(cogvideox, predicted(CogVideoXDDIMScheduler, False))
PYTHON
