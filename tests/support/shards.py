"""Shards of a few samples, written and read."""

import numpy as np

from amed_engine.datasets.formats import FORMATS
from amed_engine.datasets.samples import Samples

ABOUT = {"plan": "ipndm of 5 evaluations", "model": {"fingerprint": "0123"}, "guidance": None}
SEEDS = [42, 7, 4294967295, 8, 1000000]


def samples(seeds=SEEDS, shape=(5, 4, 3), dtype="uint8", labels=None):
    """Smooth and noisy ones, a constant one first."""
    random = np.random.default_rng(len(seeds))
    if dtype == "uint8":
        arrays = random.integers(0, 256, (len(seeds), *shape)).astype(np.uint8)
        arrays[0] = 128
    else:
        arrays = random.standard_normal((len(seeds), *shape)).astype(dtype)
    kinds = {
        None: None,
        "class": random.integers(0, 10, len(seeds)),
        "numbers": random.standard_normal((len(seeds), 3)).astype(np.float32),
    }
    return Samples(list(seeds), arrays, kinds[labels])


def write(format, path, given, batch=2, about=ABOUT):
    writer = FORMATS[format].open(path, len(given), given.arrays.shape[1:], str(given.arrays.dtype), about)
    for part in given.split(batch):
        writer.add(part)
    writer.close()
    return path


def read(format, path, batch=2):
    parts = list(FORMATS[format].read(path, batch))
    assert all(len(part) <= batch for part in parts)
    labels = [part.labels for part in parts if part.labels is not None]
    seeds = [seed for part in parts for seed in part.seeds]
    return Samples(seeds, np.concatenate([p.arrays for p in parts]), np.concatenate(labels) if labels else None)


def in_order_of_seeds(given):
    order = np.argsort(given.seeds)
    labels = None if given.labels is None else given.labels[order]
    return Samples([given.seeds[i] for i in order], given.arrays[order], labels)


def assert_same(got, expected):
    assert got.seeds == expected.seeds
    assert got.arrays.dtype == expected.arrays.dtype
    np.testing.assert_array_equal(got.arrays, expected.arrays)
    assert (got.labels is None) == (expected.labels is None)
    if expected.labels is not None:
        assert got.labels.dtype == expected.labels.dtype
        np.testing.assert_array_equal(got.labels, expected.labels)


def shard(format, folder, name="shard-000003"):
    return folder / (name + FORMATS[format].suffix)


def bytes_of(path):
    """Relative name -> bytes of a file, or of all in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}
