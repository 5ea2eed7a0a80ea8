#!/usr/bin/env bash
# A scheduler saved with its defaults is not JSON.
#
# Versions: torch 2.13.0, numpy 2.4.6, diffusers 0.42.1, orjson 3.13.0; Python 3.11, CPU
# Expected: scheduler_config.json, written by save_pretrained, is JSON.
# Seen: It has the line "lambda_min_clipped": -Infinity, the default of DPMSolverMultistepScheduler. RFC 8259
#   has no such number; Python's json reads it all the same, orjson raises JSONDecodeError: no digit after
#   sign.
# Why it matters: Whatever reads a pipeline's configuration outside Python (a server in Rust or Go, a browser,
#   a schema check) fails on one that was saved with nothing but defaults.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 orjson==3.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import json
import tempfile
from pathlib import Path

import orjson
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler


def saved(scheduler):
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        return (Path(folder) / "scheduler_config.json").read_text("utf-8")


assert orjson.loads(saved(DDIMScheduler()))["_class_name"] == "DDIMScheduler"
text = saved(DPMSolverMultistepScheduler())
print([line.strip() for line in text.splitlines() if "Infinity" in line])
assert json.loads(text)["lambda_min_clipped"] == float("-inf")
try:
    orjson.loads(text)
except orjson.JSONDecodeError as error:
    print("JSONDecodeError:", error)
else:
    raise AssertionError("the file is JSON now")
PYTHON
