#!/usr/bin/env bash
# The gradient of a frozen, sharded network by its input is refused if the input is a leaf.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, CPU
# Expected: torch.autograd.grad of a frozen network by its input works wrapped in FullyShardedDataParallel as
#   it does bare, and as .backward() does.
# Seen: RuntimeError: "A leaf node was passed to _will_engine_execute_node but we are currently running
#   autograd.grad(). This is currently not supported." The same call with x * 1 instead of x works, and so
#   does .backward(). One process is enough. fully_shard does not show it. The hook that was registered on x
#   stays there, and later calls with x * 1 fail too until x is replaced.
# Why it matters: Guidance by gradients (classifiers, measurements, adversarial distillation) asks
#   autograd.grad for the gradient by the latent of a network whose weights are frozen; sharding that network
#   breaks it, unless something is computed from the latent first.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
bare = torch.nn.Linear(4, 4).requires_grad_(False)
x = torch.ones(2, 4, requires_grad=True)
(expected,) = torch.autograd.grad(bare(x).sum(), x)
network = FullyShardedDataParallel(bare, use_orig_params=True, device_id=torch.device("cpu"))
try:
    torch.autograd.grad(network(x).sum(), x)
except RuntimeError as error:
    print("RuntimeError:", error)
    assert "_will_engine_execute_node" in str(error)
else:
    raise AssertionError("the gradient by a leaf works now")
try:
    torch.autograd.grad(network(x * 1).sum(), x)
except RuntimeError as error:
    assert "_will_engine_execute_node" in str(error)
else:
    raise AssertionError("the leaf is usable again now")
x = torch.ones(2, 4, requires_grad=True)
assert torch.equal(torch.autograd.grad(network(x * 1).sum(), x)[0], expected)
x = torch.ones(2, 4, requires_grad=True)
network(x).sum().backward()
assert torch.equal(x.grad, expected)
print("of x * 1, and by backward(): the gradient of the bare network")
dist.destroy_process_group()
PYTHON
