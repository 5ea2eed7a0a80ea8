#!/usr/bin/env bash
# A setting that the constructor refuses is obeyed when it comes by from_config.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: DPMSolverMultistepScheduler has no sigma_max: its constructor refuses it with a TypeError. A
#   configuration with that key, taken over by from_config from a scheduler that has it, is a configuration
#   with a key too many, which from_config ignores.
# Seen: from_config says nothing and obeys the key: with Karras levels sigmas[0] is 80.0 and the first
#   timestep 930, instead of 157.4 and 999. What the class does not know is kept in its configuration, and the
#   levels are computed from whatever the configuration has.
# Why it matters: Two schedulers made of the same class with the same arguments sample from different levels,
#   depending on which class their configuration came from, and the number cannot be passed by hand to
#   reproduce it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler


def start(**settings):
    """First level and timestep of DPM-Solver++ on Karras levels, configured from an Euler scheduler."""
    config = EulerDiscreteScheduler(**settings).config
    scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    scheduler.set_timesteps(3)
    return float(scheduler.sigmas[0]), int(scheduler.timesteps[0])


try:
    DPMSolverMultistepScheduler(sigma_max=80.0)
except TypeError as error:
    print("constructor:", error)
else:
    raise AssertionError("the constructor takes sigma_max now")
print("from_config with sigma_max=80:", start(sigma_max=80.0), "| without:", start())
assert start(sigma_max=80.0) == (80.0, 930)
assert start()[0] > 157 and start()[1] == 999
PYTHON
