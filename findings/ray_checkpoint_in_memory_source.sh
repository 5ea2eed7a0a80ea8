#!/usr/bin/env bash
# A Ray Data job with a CheckpointConfig draws everything again after a kill if its source was made by from_items.
#
# Versions: ray 2.60.0, pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6; Python 3.11, CPU
# Expected: With `DataContext.checkpoint_config` set, a job that was killed goes on where it was: rows whose ids are
#   in the checkpoint are left out, and each row is written once. So it is for ray.data.range. Of sources that cannot
#   be filtered a warning should say so: "the logical plan doesn't support checkpointing. Checkpointing will be disabled".
# Seen: For from_items (from_numpy, from_pandas, from_arrow alike) the checkpoint is written for every file and is
#   never read. No warning comes, since a source without inputs counts as filtered (`all` of nothing). The second run
#   writes all rows again beside those of the first, under new names: rows are there twice, and nothing failed.
# Why it matters: Seeds are such a list. A data set of samples that was continued after a kill holds some seeds
#   twice, which FID and every count take for more samples.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'ray[data]==2.60.0' pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cat >"$folder/job.py" <<'PYTHON'
import os
import sys
import warnings

import ray
from ray.data.checkpoint import CheckpointConfig

source, folder, killed = sys.argv[1], sys.argv[2], sys.argv[3] == "killed"
ray.init(num_cpus=3, include_dashboard=False, logging_level="error", log_to_driver=False)
context = ray.data.DataContext.get_current()
context.enable_progress_bars = False
context.checkpoint_config = CheckpointConfig("id", f"{folder}/checkpoint", delete_checkpoint_on_success=False)


def draw(batch):
    if killed and batch["id"][0] >= 4:
        raise RuntimeError("the job ends here")
    return batch


warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    if source == "range":
        rows = ray.data.range(8, override_num_blocks=8)
    else:
        rows = ray.data.from_items([{"id": i} for i in range(8)], override_num_blocks=8)
    try:
        rows.map_batches(draw, batch_size=1).write_parquet(f"{folder}/out")
    except Exception as error:
        assert killed and "the job ends here" in str(error), error
print("warned of checkpointing:", any("heckpoint" in str(warning.message) for warning in caught))
PYTHON
cat >"$folder/count.py" <<'PYTHON'
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

source, folder = sys.argv[1], Path(sys.argv[2])
counts = Counter(i for path in folder.glob("out/*.parquet") for i in pq.read_table(path)["id"].to_pylist())
marked = {i for path in folder.glob("checkpoint/*.parquet") for i in pq.read_table(path)["id"].to_pylist()}
twice = sorted(i for i, count in counts.items() if count > 1)
print(f"{source}: {len(counts)} ids, {len(marked)} of them in the checkpoint, twice: {twice}")
assert set(counts) == marked == set(range(8))
assert bool(twice) == (source == "items")
PYTHON
for source in range items; do
    mkdir "$folder/$source" "$folder/$source/checkpoint"
    "$folder/venv/bin/python" "$folder/job.py" $source "$folder/$source" killed | tee "$folder/said" | grep -q "False"
    "$folder/venv/bin/python" "$folder/job.py" $source "$folder/$source" whole
    "$folder/venv/bin/python" "$folder/count.py" $source "$folder/$source"
done
