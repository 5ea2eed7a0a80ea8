"""Two thousand random programs: any dtypes, strides, shapes and sizes that `combine` accepts."""

import os
import random

import pytest
import torch

from amed_engine import kernels
from amed_engine.kernels import combine

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COUNT = int(os.environ.get("AMED_FUZZ_N", "20" if INTERPRETED else "2000"))
ONLY = os.environ.get("AMED_FUZZ_ONLY_SEED")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "batch_last", "sliced", "offset", "cropped"]


def draw(seed: int) -> dict:
    """The configuration of a seed."""
    rng = random.Random(seed)
    first = rng.choice([*DTYPES, torch.float64])
    others = [*DTYPES, torch.float64] if first == torch.float64 else DTYPES
    count = rng.choice([1, 2, 3, 3, 4, 5, 8, 16])
    return {
        "shape": (rng.randint(1, 9), rng.randint(1, 5), rng.randint(1, 12), rng.randint(1, 40)),
        "dtypes": (first, *(rng.choice([first, rng.choice(others)]) for _ in range(count - 1))),
        "rows": rng.choice([1, 1, 2, 2, 3, 8]),
        "count": count,
        "layouts": tuple(rng.choice(["contiguous", *LAYOUTS]) for _ in range(count)),
        "shared": rng.random() < 0.5,
    }


def test_random_programs(device, make_case, assert_matches):
    # Triton compiles nearly every one of these anew, half a second each.
    compiling = device.type == "cuda" and kernels.backends()["cuda"] == "triton" and "AMED_FUZZ_N" not in os.environ
    seeds = [int(ONLY)] if ONLY else range(60 if compiling else COUNT)
    for seed in seeds:
        config = draw(seed)
        try:
            case = make_case(seed=seed, device=device, **config)
            out = [torch.full_like(case.sources[0], float("nan")) for _ in range(config["rows"])]
            combine(case.sources, case.coeffs, out=out)
            assert_matches(out, case)
            again = combine(case.sources, case.coeffs)
            assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True)), "two runs differ"
        except Exception as error:
            pytest.fail(f"AMED_FUZZ_ONLY_SEED={seed} repeats it on {device}: {config}\n{error}")
