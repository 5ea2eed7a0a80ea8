#!/usr/bin/env bash
# safetensors.load of bytes returns the tensors in another order on every call; load_file of the same bytes does not.
#
# Versions: safetensors 0.8.0, numpy 2.4.6; Python 3.11
# Expected: The dictionary is in the order of the file, as a state dict has an order, and as `load_file` of the same bytes returns it.
# Seen: `safetensors.numpy.load(data)` and `safetensors.deserialize(data)` (which `safetensors.torch.load` is made of) give the names in
#   an order that changes from call to call within one process: of four tensors all 24 orders come up. `load_file` gives the one order
#   of the file each time. The values are right in both.
# Why it matters: Code that looks at the first entry (the dtype or the device of a checkpoint), hashes names and values as they come, or
#   zips two dictionaries works with files and fails now and then with bytes: what comes over a network or out of an archive.
# Remedy: sort by name, or write the file and use `load_file`.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/four.safetensors" <<'PYTHON'
import sys

import numpy as np
import safetensors
import safetensors.numpy

tensors = {name: np.full(2, number, np.float32) for number, name in enumerate("abcd")}
data = safetensors.numpy.save(tensors)
with open(sys.argv[1], "wb") as file:
    file.write(data)

of_file = {"".join(safetensors.numpy.load_file(sys.argv[1])) for _ in range(1000)}
of_bytes = {"".join(safetensors.numpy.load(data)) for _ in range(1000)}
plain = {"".join(name for name, _ in safetensors.deserialize(data)) for _ in range(1000)}
print(f"orders of load_file: {sorted(of_file)}; of load: {len(of_bytes)}; of deserialize: {len(plain)}")
loaded = safetensors.numpy.load(data)
assert all(np.array_equal(loaded[name], tensors[name]) for name in tensors)
assert of_file == {"abcd"}
assert len(of_bytes) > 12
assert len(plain) > 12
PYTHON
