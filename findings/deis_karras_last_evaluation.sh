#!/usr/bin/env bash
# On Karras levels the last evaluation of DEIS is thrown away.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: DEISMultistepScheduler takes n steps for n timesteps, on Karras levels as on its own.
# Seen: On Karras levels, and on exponential ones, the last two of its levels are both the smallest: 157.4,
#   21.1, 1.25, 0.01, 0.01 for four timesteps. The last step has length zero and returns its input bit for
#   bit, whatever the network says; one step returns the noise that it was given. On its own levels every step
#   moves. DPMSolverMultistepScheduler does without this: its last level is 0, and there is no such setting
#   for DEIS.
# Why it matters: One evaluation in n is paid for and thrown away, one in four at four steps, and comparisons
#   by the number of evaluations count it. A one-step sample is pure noise, with no error.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler


def moves(scheduler_class, count, prediction, **settings):
    """Largest change of the latent in each step, by a network that always answers prediction * noise."""
    scheduler = scheduler_class(**settings)
    scheduler.set_timesteps(count)
    x, changes = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []
    for t in scheduler.timesteps:
        before, x = x, scheduler.step(prediction * torch.ones_like(x), t, x).prev_sample
        changes.append(float((x - before).abs().max()))
    print(scheduler_class.__name__, settings, "levels", [round(float(sigma), 3) for sigma in scheduler.sigmas])
    print("    changes", changes)
    return changes


for kind in ("karras", "exponential"):
    settings = {f"use_{kind}_sigmas": True}
    for prediction in (0.5, -3.0):
        assert moves(DEISMultistepScheduler, 1, prediction, **settings) == [0.0]
        *others, last = moves(DEISMultistepScheduler, 4, prediction, **settings)
        assert last == 0.0 and min(others) > 0
assert min(moves(DEISMultistepScheduler, 4, 0.5)) > 0
assert min(moves(DPMSolverMultistepScheduler, 4, 0.5, use_karras_sigmas=True)) > 0
PYTHON
