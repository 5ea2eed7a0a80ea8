"""A disk that fills up while a shard is written: the error of the operating system, and a writer that can be let go."""

import subprocess
import sys

import pytest

from amed_engine.datasets.formats import FORMATS

# In a process of its own: the limit is of all files that it writes.
PROGRAM = """
import pathlib, resource, signal, sys
import numpy as np
from amed_engine.datasets.formats import FORMATS
from amed_engine.datasets.samples import Samples

format, path = FORMATS[sys.argv[1]], pathlib.Path(sys.argv[2])
given = Samples(list(range(64)), np.random.default_rng(0).integers(0, 256, (64, 40, 40, 3)).astype(np.uint8))
writer = format.open(path, 64, (40, 40, 3), "uint8", {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    for part in given.split(8):
        writer.add(part)
    writer.close()
except OSError as error:
    writer.abort()
    sys.exit(f"errno {error.errno}")
"""


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_an_error_of_the_operating_system(format, tmp_path):
    if library := FORMATS[format].library:
        pytest.importorskip(library)
    path = tmp_path / f"shard-000003{FORMATS[format].suffix}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, format, path], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stderr.strip() == "errno 27"
    assert done.returncode == 1
