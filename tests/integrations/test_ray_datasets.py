"""A dataset drawn by actors of a local Ray cluster is the one that a process draws, whoever is killed meanwhile."""

import contextlib
import functools
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from amed_engine import AmedError, ConfigError, Sampler
from amed_engine.datasets.claims import Claims
from amed_engine.datasets.generate import generate_dataset
from amed_engine.datasets.job import load_manifest
from amed_engine.datasets.ray import generate
from amed_engine.errors import MissingDependency

SOURCE = functools.partial(Sampler, "digits", nfe=3)
DRAWN = {"seeds": "0-799", "shard": 100, "format": "npz"}
KILLED = {"seeds": "0-2999", "shard": 250, "format": "npz"}
PROGRAM = """
import functools, json, sys
from amed_engine import Sampler
from amed_engine.datasets.ray import generate
source = functools.partial(Sampler, "digits", nfe=3)
print(json.dumps(generate(source, out=sys.argv[1], actors=2, num_cpus=0.5, **json.loads(sys.argv[2])).to_json()))
"""


@pytest.fixture(scope="module")
def ray():
    """A cluster of this machine."""
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    ray = importlib.import_module("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process draws."""
    return generate_dataset(SOURCE, out=tmp_path_factory.mktemp("single"), **DRAWN)


def files(folder) -> dict[str, bytes]:
    """Of the shards."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("shard-*")}


def all_files(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}


def seeds_in(folder: Path) -> list[int]:
    """Of every sample that can be read."""
    job, _ = load_manifest(folder)
    shards = [batch.seeds for path in sorted(folder.glob("shard-*")) for batch in job.kind.read(path, 100)]
    return [seed for seeds in shards for seed in seeds]


def test_actors_draw_what_one_process_draws(ray, single, tmp_path):
    report = generate(SOURCE, out=tmp_path, verify=3, **DRAWN)
    assert (report.samples, report.drawn, report.in_other_hands, report.verified) == (800, 800, 0, 3)
    assert report.set_hash == single.set_hash
    assert files(tmp_path) == files(single.folder)
    assert all_files(tmp_path) == all_files(single.folder)
    assert ray.is_initialized()  # a connection that was there stays


def test_a_second_run_draws_what_is_missing_and_another_job_is_refused(ray, single, tmp_path):
    generate_dataset(SOURCE, out=tmp_path, **DRAWN)
    for gone in (1, 6):
        (tmp_path / f"shard-{gone:06d}.npz").unlink()
    report = generate(SOURCE, out=tmp_path, actors=(1, 2), num_cpus=0.5, **DRAWN)
    assert (report.samples, report.drawn, report.set_hash) == (800, 200, single.set_hash)
    with pytest.raises(ConfigError, match=r"seeds is .* there"):
        generate(SOURCE, out=tmp_path, **{**DRAWN, "seeds": "0-899"})


def test_an_actors_error_is_told_and_ends_the_run(ray, tmp_path):
    (tmp_path / "shard-000002.npz").mkdir()
    (tmp_path / "shard-000002.npz" / "mine").touch()
    first = generate_dataset(SOURCE, out=tmp_path / "other", **DRAWN)
    (tmp_path / "manifest.json").write_bytes(Path(first.folder, "manifest.json").read_bytes())
    with pytest.raises(AmedError, match=r"shard-000002.npz is there and not in the ledger.*shards are missing"):
        generate(SOURCE, out=tmp_path, **DRAWN)
    assert (tmp_path / "shard-000002.npz" / "mine").exists()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"num_gpus": 1}, "no node has room for an actor of 1 CPUs and 1 GPUs"),
        ({"num_cpus": 64}, "no node has room"),
        ({"num_cpus": 0}, "not both 0"),
        ({"num_cpus": -1}, "at least 0"),
        ({"actors": 0}, "actors must be a whole number of at least 1"),
        ({"actors": (2, 1)}, "actors must be a whole number of at least 2"),
        ({"actors": "2"}, "actors must be a whole number"),
        ({"verify": -1}, "verify must be"),
        ({"address": "auto"}, "connected to a Ray cluster already"),
        ({"out": "relative"}, "absolute path on storage that all"),
        ({"source": Sampler}, "a function that makes the source"),
        ({"seeds": "5,5"}, "seeds are named twice: 5"),
        ({"class_labels": 77}, "77"),
        ({"format": "gif"}, "format must be one of"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_no_folder(ray, tmp_path, told, message):
    settings = {"source": SOURCE, "out": tmp_path / "data", **DRAWN, **told}
    with pytest.raises(ConfigError, match=message):
        generate(**settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no.such.host.invalid:6379"])
def test_where_no_cluster_answers_the_address_is_refused(address):
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    code = (
        "from functools import partial\nfrom amed_engine import Sampler\nfrom amed_engine.datasets.ray import generate\n"
        f"generate(partial(Sampler, 'digits'), '0-9', '/nowhere', address={address!r})"
    )
    told = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert f"ConfigError: there is no Ray cluster at '{address}'" in told.stderr


# ---- killed


@contextlib.contextmanager
def program(folder: Path, settings: dict) -> Iterator[subprocess.Popen]:
    """`generate` in a process and a Ray cluster of its own."""
    command = [sys.executable, "-P", "-c", PROGRAM, str(folder), json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def drawing(folder: Path, process: subprocess.Popen, killed: set[int], seconds: float = 400.0) -> int | None:
    """The process id of an actor that draws a shard, of those that live; None where the run ended first."""
    ends = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < ends:
        for claim in (folder / "claims").glob("[0-9]*.json"):
            with contextlib.suppress(OSError, ValueError):
                if (pid := json.loads(claim.read_text())["pid"]) not in killed:
                    return pid
        time.sleep(0.01)
    return None


def test_killed_actors_cost_nothing(tmp_path):
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    expected = generate_dataset(SOURCE, out=tmp_path / "single", **KILLED)
    folder, chance, killed = tmp_path / "data", random.Random(5), set()
    with program(folder, KILLED) as process:
        for _ in range(4):
            if (pid := drawing(folder, process, killed)) is not None:
                time.sleep(chance.uniform(0, 0.3))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        report = json.loads(process.communicate(timeout=300)[0].splitlines()[-1])
    assert len(killed) >= 2
    assert (report["samples"], report["drawn"], report["set_hash"]) == (3000, 3000, expected.set_hash)
    assert sorted(seeds_in(folder)) == list(range(3000))
    assert all_files(folder) == all_files(expected.folder)


def test_a_killed_run_is_continued(tmp_path):
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    expected = generate_dataset(SOURCE, out=tmp_path / "single", **KILLED)
    folder = tmp_path / "data"
    with program(folder, KILLED) as process:
        while not list(folder.glob("shard-*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    with program(folder, KILLED) as process:
        report = json.loads(process.communicate(timeout=300)[0].splitlines()[-1])
    assert report["samples"] == 3000
    assert 0 < report["drawn"] < 3000
    assert report["set_hash"] == expected.set_hash
    assert all_files(folder) == all_files(expected.folder)


def test_an_interrupt_ends_the_run_after_the_open_shards(tmp_path):
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    with program(tmp_path / "data", KILLED) as process:
        assert drawing(tmp_path / "data", process, set()) is not None
        process.send_signal(signal.SIGINT)
        report = json.loads(process.communicate(timeout=300)[0].splitlines()[-1])
    assert report["interrupted"]
    assert 0 < report["drawn"] < 3000
    assert set(seeds_in(tmp_path / "data")) < set(range(3000))
    assert all_files(tmp_path / "data") <= {"manifest.json", "ledger.jsonl", *files(tmp_path / "data")}


# ---- without Ray


def test_without_ray_the_module_is_there_and_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    module = importlib.reload(importlib.import_module("amed_engine.datasets.ray"))
    with pytest.raises(MissingDependency, match=r"pip install 'amed-engine\[ray\]'"):
        module.generate(SOURCE, "0-9", tmp_path)


def test_a_claim_of_the_same_run_is_a_dead_actors(tmp_path):
    left = Claims(tmp_path, run="a")
    left.folder.mkdir()
    for shard in (3, 4):
        (left.folder / f"{shard:06d}.json").write_text(
            json.dumps({"system": "0badcafe", "host": "b", "pid": 1, "run": "a"})
        )
    assert Claims(tmp_path).take(3) is None
    assert Claims(tmp_path, run="b").take(3) is None
    claim = left.take(3)
    assert claim is not None
    assert list(Claims(tmp_path).held()) == [3, 4]
    claim.release()
    assert left.held() == {}
    assert list(left.folder.iterdir()) == []
