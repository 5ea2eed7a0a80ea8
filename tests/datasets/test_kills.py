"""Runs that are interrupted and killed, as processes of the command line: what they leave is whole, and is gone on with."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dataset_folders import contents

from amed_engine.datasets.claims import Claims
from amed_engine.datasets.ledger import Ledger

JOB = ["--model", "digits", "--nfe", "3", "--seeds", "0-399", "--format", "npz", "--shard", "20"]


def start(out, *more, job=JOB):
    command = [sys.executable, "-P", "-m", "amed_engine", "generate", *job, "--out", str(out), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whatever started the tests ignores
    return subprocess.Popen(command, **pipes, preexec_fn=heard)


def shards(out) -> int:
    return len(Ledger(out).refresh())


def wait_for(out, count, process):
    until = time.monotonic() + 120
    while shards(out) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "data"
    process = start(out)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return contents(out), printed.splitlines()[-1]


SEVERAL = pytest.param("2", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("workers", "number"), [("1", signal.SIGINT), pytest.param("2", signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupt_finishes_the_open_shard(tmp_path, whole, workers, number):
    process = start(tmp_path, "--workers", workers)
    wait_for(tmp_path, 2, process)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.count("finishing the open shard; interrupt again to give it up and end at once") == 1
    there = len(contents(tmp_path))  # no litter either
    assert 40 <= there < 400
    assert f"interrupted: {there} of 400 samples are in {tmp_path}; the same command draws the others" in errors
    process = start(tmp_path, "--workers", workers)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert contents(tmp_path) == whole[0]
    assert printed.splitlines()[-1] == whole[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait", [0, 0.1, 0.2])
def test_an_interrupt_while_torch_is_imported(tmp_path, number, wait):
    process = start(tmp_path / "data")
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(wait)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "amed: error: interrupted\n")


@pytest.mark.parametrize("workers", ["1", SEVERAL])
def test_kills_at_any_moment_lose_nothing(tmp_path, whole, workers):
    chance = random.Random(int(workers))
    for _ in range(4):
        before, process = shards(tmp_path), start(tmp_path, "--workers", workers)
        wait_for(tmp_path, min(before + 1, 20), process) if before < 20 else None
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
    process = start(tmp_path, "--workers", workers, "--verify", "20")
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert contents(tmp_path) == whole[0]
    assert printed.splitlines()[-1] == whole[1]


def test_a_killed_worker_costs_its_open_shard_alone(tmp_path, whole):
    process = start(tmp_path, "--workers", "2")
    wait_for(tmp_path, 2, process)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(children) as file:
        os.kill(int(file.read().split()[-1]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert contents(tmp_path) == whole[0]


def torchrun(out):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "amed_engine", "generate"]
    command = [sys.executable, "-P", *command, *JOB, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_ranks_of_torchrun_share_the_work_also_after_a_kill(tmp_path, whole):
    process = torchrun(tmp_path)
    wait_for(tmp_path, 2, process)
    process.kill()  # its ranks finish their open shards
    process.communicate()
    process = torchrun(tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    until = time.monotonic() + 60
    while Claims(tmp_path).held() and time.monotonic() < until:
        time.sleep(0.1)
    Claims(tmp_path).tidy()
    assert contents(tmp_path) == whole[0]
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 20


def test_two_commands_at_once_share_the_work(tmp_path, whole):
    processes = [start(tmp_path), start(tmp_path)]
    ended = [(process.communicate(), process.returncode) for process in processes]
    assert [code for _, code in ended] == [0, 0], ended
    assert contents(tmp_path) == whole[0]
    assert shards(tmp_path) == 20 == len((tmp_path / "ledger.jsonl").read_text().splitlines())
