#!/usr/bin/env bash
# While a model compiled by AOTInductor runs, no other Python thread of the process does.
#
# Versions: torch 2.13.0, numpy 2.4.6, setuptools 82.0.1; Python 3.11 and a C++ compiler, CPU
# Expected: A call of what `torch._inductor.aoti_load_package` returns lets other threads work while it computes, as every
#   operator of torch does in eager mode, and as ONNX Runtime does.
# Seen: The call keeps the interpreter's lock from its beginning to its end. A thread that wants to wake every millisecond did
#   so about once a millisecond beside the eager network, and once or twice in a whole call of the compiled one.
# Why it matters: A server's event loop stands still for the length of a sampling run, health checks and cancellations
#   included; a thread that encodes or writes samples works only between the calls, never beside them; two threads with
#   a model each are as fast as one. Processes help, and so does a runner in C++.
# Known: pytorch/pytorch issue 197516
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 setuptools==82.0.1
cat >"$folder/show.py" <<'PYTHON'
import sys
import threading
import time

import torch
import torch._inductor

torch.set_num_threads(1)


class Network(torch.nn.Module):
    def forward(self, x):
        for _ in range(30):
            x = torch.tanh(x @ x)
        return x


def woken(call):
    """How often another thread woke up during a call, for each of its milliseconds."""
    times, over = [], threading.Event()

    def wake():
        while not over.is_set():
            times.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=wake)
    thread.start()
    time.sleep(0.05)
    started = time.perf_counter()
    call()
    ended = time.perf_counter()
    over.set()
    thread.join()
    return sum(started < each < ended for each in times) / (1000 * (ended - started))


x = torch.randn(1024, 1024) / 32
program = torch.export.export(Network().eval(), (x,))
path = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
compiled, eager = torch._inductor.aoti_load_package(path), Network()
with torch.no_grad():
    compiled(x), eager(x)
    found = {name: max(woken(lambda: call(x)) for _ in range(3)) for name, call in (("eager", eager), ("compiled", compiled))}
print({name: round(each, 3) for name, each in found.items()})
assert found["eager"] > 0.2, "the eager network stops other threads too: this machine cannot show it"
assert found["compiled"] < 0.02, "other threads run beside the compiled model: the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder/network.pt2"
