#!/usr/bin/env bash
# A U-Net of diffusers that torch.export was told to take in any batch takes 63 samples at most.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1; Python 3.11, CPU
# Expected: UNet2DModel has no largest batch: it answers 64 samples as 64 times one. Exported with Dim.DYNAMIC for the
#   batch, the program should as well.
# Seen: the export succeeds without a word, and the program refuses the 64th sample, AssertionError: Guard failed,
#   size()[0] <= 63. An upsampling layer makes its input contiguous from 64 samples on, a branch that the export follows
#   for its example alone. Asked for by name, Dim("batch", max=1024), the export fails and suggests max=63; exported from an
#   example of 64 samples, the program refuses 63.
# Why it matters: A server that exports from a small example passes all its tests and fails at the first large batch. Two
#   programs, of an example below and one above, are needed for all sizes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import UNet2DModel
from torch.export import Dim

torch.manual_seed(0)
blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
small = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 32), "norm_num_groups": 8}
network = UNet2DModel(**small, **blocks).eval()


def inputs(batch):
    return torch.randn(batch, 3, 8, 8), torch.arange(batch)


def exported(batch, size):
    shapes = {"sample": {0: size}, "timestep": {0: size}, "return_dict": None}
    program = torch.export.export(network, inputs(batch), {"return_dict": False}, dynamic_shapes=shapes)
    return program.module()


def refuses(program, batch):
    try:
        program(*inputs(batch), return_dict=False)
    except AssertionError as error:
        print(f"{batch} samples: AssertionError: {error}")
        return True
    print(f"{batch} samples: answered")
    return False


x, t = inputs(64)
with torch.no_grad():
    off = (network(x, t).sample[:1] - network(x[:1], t[:1]).sample).abs().max().item()
print(f"UNet2DModel itself: 64 samples answered, the first {off:.1e} from its answer alone")
assert off < 1e-5
print("exported from 2 samples with Dim.DYNAMIC")
small_batches = exported(2, Dim.DYNAMIC)
assert [refuses(small_batches, batch) for batch in (3, 63, 64)] == [False, False, True]
print("exported from 64 samples with Dim.DYNAMIC")
large_batches = exported(64, Dim.DYNAMIC)
assert [refuses(large_batches, batch) for batch in (63, 64, 100)] == [True, False, False]
try:
    exported(2, Dim("batch", max=1024))
except torch._dynamo.exc.UserError as error:
    said = str(error)
print([line.strip() for line in said.splitlines() if "max=" in line])
assert "max=63" in said
PYTHON
