"""Digits by two actors of a local Ray cluster, for bench_datasets.py: SAMPLES NFE FORMAT SHARD FOLDER."""

import functools
import sys

from amed_engine import Sampler
from amed_engine.datasets.ray import generate

if __name__ == "__main__":
    samples, nfe, form, shard, folder = sys.argv[1:]
    source = functools.partial(Sampler, "digits", nfe=int(nfe))
    told = {"format": form, "shard": int(shard), "actors": 2, "num_cpus": 0.5}
    print(generate(source, f"0-{int(samples) - 1}", folder, **told).table())
