#!/usr/bin/env bash
# Group offloading is enabled without accelerate, and fails at the first forward.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: accelerate is optional. A method that needs it says so when it is called, with an ImportError that
#   names the package.
# Seen: enable_group_offload succeeds without accelerate; the first forward raises NameError: name
#   'send_to_device' is not defined.
# Why it matters: The model is loaded and offloaded, and then the first evaluation of the first step fails
#   with a message that names neither the missing package nor offloading.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.util

import torch
from diffusers import UNet2DModel

assert importlib.util.find_spec("accelerate") is None
unet = UNet2DModel(
    sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
)
cpu = torch.device("cpu")
unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
print("offloading enabled")
try:
    unet(torch.zeros(1, 3, 8, 8), 1)
except NameError as error:
    print("NameError:", error)
    assert "send_to_device" in str(error)
else:
    raise AssertionError("the forward works without accelerate now")
PYTHON
