#!/usr/bin/env bash
# Of a CPU generator's 64-bit seed the upper half is ignored.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, CPU
# Expected: Seeds are 64 bits: torch.Generator.manual_seed calls any 32-bit integer valid, documents a range
#   up to 0xffff_ffff_ffff_ffff, refuses what lies outside, and initial_seed() gives all of it back. Different
#   seeds give different noise.
# Seen: On the CPU the seeds 5, 5 + 2**32 and 5 + 7 * 2**32 give the same noise bit for bit: only the lower 32
#   bits reach the Mersenne twister, while initial_seed() still tells them apart. NumPy's default_rng draws
#   three different noises from them.
# Why it matters: Seeds made of two numbers (rank << 32 | index), of a hash or of a 64-bit random number
#   collide without a word: workers draw the same latents, and a set of samples holds copies. Of a million
#   random 64-bit seeds about 116 pairs are expected to agree.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch

SEEDS = (5, 5 + 2**32, 5 + 7 * 2**32)
generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
noise = [torch.randn(3, 32, 32, generator=generator) for generator in generators]
print("initial seeds", [generator.initial_seed() for generator in generators])
print("first values", [float(values.flatten()[0]) for values in noise])
assert tuple(generator.initial_seed() for generator in generators) == SEEDS
assert all(torch.equal(values, noise[0]) for values in noise)
assert not torch.equal(noise[0], torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(6)))
assert len({float(np.random.default_rng(seed).standard_normal()) for seed in SEEDS}) == 3
PYTHON
