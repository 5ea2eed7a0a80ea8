"""What the serving benchmarks conclude from numbers, and what the soak takes for a finding."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from amed_engine.errors import AmedError
from amed_engine.serving.load import Arrival, Outcome

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    # The modules of benchmarks/ have everyday names; leave none behind.
    for name in [name for name, module in sys.modules.items() if _lies_in_benchmarks(module)]:
        del sys.modules[name]


def _lies_in_benchmarks(module):
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).parent == BENCHMARKS


def found(**changes):
    """A file of every part, with the numbers that targets are read from."""
    from serving_engines import GROUPED, SINGLE, TICKS
    from serving_servers import AMED, LITSERVE

    def row(times):
        return {"seconds": times, "ticks_are_times_faster": times}

    def served(p99):
        latency = {"p50": 0.1, "p95": 0.2, "p99": p99}
        return {"median_latency": latency, "median_samples_per_second": 10.0, "failed": 0}

    at = {AMED: served(0.4), LITSERVE: served(1.0)}
    group = {"count": 10, "p50": 0.1, "p95": 0.2, "p99": 0.3}
    over = {"tick_over_network": [1.0, 1.1, 1.2], "whole_over_network": [1.0, 1.1, 1.3]}
    size = {"rows": 16, "tick_ms": 20.0, "outside_ms": 1.0, "network_ms": 19.0}
    data = {
        "saturation": {"requests": 96, "contestants": {SINGLE: row(6.0), TICKS: row(1.0), GROUPED: row(0.9)}},
        "latency": {"load": 0.7, "mixed": {"NFE 3": group}, "alone": {"NFE 3": group}, "p95_of_3_ratio": 1.2},
        "servers": {"saturation": at, f"70% of {AMED}": at},
        "overhead": {
            "environment": {"gpu": None},
            "sizes": [{**size, "outside_shares": [0.05, 0.2, 0.06], **over}],
        },
    }
    return data | changes


def test_targets_are_read_from_the_numbers():
    import bench_serving

    targets = list(bench_serving.judged(found()))
    assert [(target.value, target.met) for target in targets] == [
        (6.0, True),
        (0.9, False),
        (1.2, True),
        (0.4, True),
        (0.06, True),
    ]
    assert list(bench_serving.judged({})) == []
    text = bench_serving.tables(found())
    assert "| mixed, NFE 3 | 10 | 100 | 200 | 300 |" in text
    assert "| 16 | 20 | 19 | 1.100 | 1.100 | 1 |" in text
    assert text.splitlines()[-1].endswith("0.06, at most 0.08: met")


def test_what_a_gpu_is_held_to():
    import bench_serving

    size = {"outside_shares": None, "tick_over_network": [1.02, 1.05, 1.5]}
    sizes = [{"rows": rows, **size} for rows in (1, 8, 64)]
    overhead = {"environment": {"gpu": "a GPU"}, "sizes": sizes}
    targets = list(bench_serving.judged({"overhead": overhead}))
    assert [(target.value, target.limit, target.met) for target in targets] == [(1.05, 1.1, True), (1.05, 1.03, False)]


@pytest.mark.parametrize("arguments", [["--parts", "nothing"], ["--parts", "servers"], ["--unknown"]])
def test_a_part_that_cannot_be(arguments, capsys):
    import bench_serving

    with pytest.raises(SystemExit) as ended:
        bench_serving.main(arguments)
    assert ended.value.code == 2


def test_grouped_requests_come_back_in_their_order():
    from serving_engines import Bench

    with (bench := Bench(rows=4, requests=12)).engine:
        alone = bench.one_at_a_time()
        assert torch.allclose(bench.grouped(3), alone, atol=1e-4)
        assert torch.allclose(bench.ticks(), alone, atol=1e-4)


def outcome(kind="answered", reason=""):
    return Outcome(Arrival(0.0, 3, (0,)), 0.0, 0.0, 1.0, kind, reason)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        (
            {"outcomes": [outcome(), *[outcome("failed", "no answer within 60 s")] * 2]},
            ["2 times: no answer within 60 s"],
        ),
        ({"left": {"amed_rows_live": 1.0}}, ["amed_rows_live is 1 after the last request"]),
        ({"drained": {"drained": ["reset"], "status": 0}}, ["while it drained: reset"]),
        (
            {"drained": {"drained": [], "status": None}},
            ["the server ended with status None after SIGTERM (None: not at all)"],
        ),
        ({"memory": [(k, 100.0 + 2 * k) for k in range(20)]}, ["memory grew by 20.0 MiB"]),
    ],
)
def test_what_a_soak_finds(changes, expected):
    import soak_serving

    memory = [(k, 300.0 if k > 4 else 60.0 * k) for k in range(20)]  # it grows while it warms up
    given = {"outcomes": [outcome()], "left": {"amed_rows_live": 0.0}, "drained": {"drained": [], "status": 0}}
    assert soak_serving.findings(**{**given, "memory": memory, "limit": 16.0, **changes}) == expected


def test_a_wrong_sample_is_seen():
    from soak_clients import Truth, Variant

    variant, truth = Variant(3), object.__new__(Truth)
    truth.images = {variant: torch.linspace(-1, 1, 3 * 1 * 4 * 4).reshape(3, 1, 4, 4)}
    right = truth.images[variant][[2, 0]].numpy()
    pictures = np.clip(right[:, 0] * 127.5 + 128, 0, 255).astype(np.uint8)
    truth.check(variant, [2, 0], right + 1e-5)
    truth.check(variant, [2, 0], pictures + (pictures < 255))
    for wrong in (right + 1e-4, right[:1], np.full_like(right, np.nan), right[::-1], pictures[::-1], pictures[..., :2]):
        with pytest.raises(AmedError, match="wrong samples"):
            truth.check(variant, [2, 0], wrong)
