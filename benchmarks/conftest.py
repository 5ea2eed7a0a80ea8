"""pytest-benchmark as runner and reporter of measurements that are taken together and shown one by one."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # harness and contestants; pytest's importlib mode adds nothing itself

from harness import Playback, environment
from targets import judged

PLAYBACK = Playback()
ROWS: dict[str, dict[str, dict[str, dict]]] = {"kernels": {}, "samples": {}}  # suite -> case -> contestant -> row


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also what takes minutes: CIFAR-10 on a CPU, compiled loops")
    parser.addoption("--results", type=Path, help="a JSON for what was measured, where, and the targets met or missed")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=PLAYBACK))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_benchmark_update_json(output_json):
    """Not into the machine's own description: with a time and a commit in it, no two runs would compare without a warning."""
    output_json["environment"] = environment(_device())


def _device():
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


def pytest_sessionfinish(session):
    if (file := session.config.getoption("--results")) is None:
        return
    command = "pytest " + " ".join(map(str, session.config.invocation_params.args))
    data = {
        "command": command,
        "environment": environment(_device()),
        "targets": [t.to_json() for t in judged(**ROWS)],
        **ROWS,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter):
    for target in judged(**ROWS):
        terminalreporter.write_line(target.describe())


@pytest.fixture(scope="session")
def measured():
    """A case (suite, device, label) is measured once, all its contestants in turns, when the first of them is asked for."""
    kept = {}

    def get(suite, device, label, run):
        key = (suite, device.type, label)
        if key not in kept:
            kept[key] = ROWS[suite][label] = run()
        return kept[key]

    return get


@pytest.fixture
def report(benchmark):
    """Hand one contestant's times to pytest-benchmark, or skip with the reason why there are none."""

    def tell(group, rows, contestant):
        row = rows.get(contestant, rows.get("all", {"skipped": "does not take part in this case"}))
        if "skipped" in row:
            pytest.skip(row["skipped"])
        seconds = row["wall_seconds"]
        benchmark.group, benchmark.extra_info = group, {k: v for k, v in row.items() if k != "wall_seconds"}
        benchmark.name = contestant
        benchmark.pedantic(lambda: None, rounds=PLAYBACK.load(seconds), iterations=1)

    return tell
