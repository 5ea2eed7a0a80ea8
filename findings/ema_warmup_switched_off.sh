#!/usr/bin/env bash
# EMAModel ramps the decay up whether or not warm-up is switched on.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: EMAModel(decay=0.9999) with use_ema_warmup=False, the default, averages with decay 0.9999 from the
#   first step, as torch's AveragedModel with get_ema_multi_avg_fn(0.9999) does.
# Seen: The decay is min(0.9999, (1 + k) / (10 + k)): 0 at the first update, 0.917 after 100 steps, 0.991
#   after 1000, 0.9991 after 10000; 0.9999 is reached after 90000. use_ema_warmup chooses between two ramps,
#   and slows down neither: with True it is 0.954 after 100 steps. A ramp can be left out only by min_decay.
# Why it matters: A decay tuned for a short run, or taken over from another code, has no effect within it: in
#   10000 steps the average reaches back about 1000 steps whether decay is 0.9995 or 0.9999, and the two give
#   the same weights.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers.training_utils import EMAModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@torch.no_grad()
def lag(decay, steps=2000):
    """How far the averages of a weight that grows by 1 a step lie behind it, with diffusers and with torch."""
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.fill_(0)
    of_diffusers = EMAModel(network.parameters(), decay=decay, use_ema_warmup=False)
    of_torch = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for step in range(steps):
        network.weight.fill_(step)
        of_diffusers.step(network.parameters())
        of_torch.update_parameters(network)
    return [float(network.weight - average) for average in (of_diffusers.shadow_params[0], of_torch.module.weight)]


ema = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.9999)
decays = [ema.get_decay(k) for k in (0, 100, 1000, 10000, 90000)]
print("decays", [round(decay, 4) for decay in decays])
assert not ema.use_ema_warmup
assert [round(decay, 4) for decay in decays] == [0.0, 0.9174, 0.9911, 0.9991, 0.9999]
for decay in (0.9995, 0.9999):
    print(f"steps behind after 2000, decay {decay}: EMAModel {lag(decay)[0]:.0f}, AveragedModel {lag(decay)[1]:.0f}")
assert 150 < lag(0.9995)[0] == lag(0.9999)[0] < 250
assert lag(0.9999)[1] > lag(0.9995)[1] + 300 > 1000
PYTHON
