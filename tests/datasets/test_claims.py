"""Claims: a living writer's is never taken, one that was left is."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from amed_engine.datasets.claims import Claims
from amed_engine.solvers.temporary import STALE, SYSTEM

HOLDER = """
import sys, time
from pathlib import Path
from amed_engine.datasets.claims import Claims
claims = [Claims(Path(sys.argv[1])).take(int(shard)) for shard in sys.argv[2:]]
print(len(claims), flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER, tmp_path, "3", "4"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "2\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_one_of_two_gets_it(tmp_path):
    claims = Claims(tmp_path)
    claim = claims.take(0)
    assert claims.take(0) is None
    assert Claims(tmp_path).take(0) is None
    assert claims.take(1) is not None
    claim.release()
    assert claims.take(0) is not None


def test_a_living_processs_claim_is_never_taken_and_a_killed_ones_is(tmp_path, holder):
    claims = Claims(tmp_path)
    assert claims.take(3) is None
    assert list(claims.held()) == [3, 4]
    assert f"process {holder.pid} on" in claims.held()[3]
    claims.tidy()
    assert list(claims.held()) == [3, 4]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    claim = claims.take(3)
    assert claim is not None
    claims.tidy()  # takes what the other left
    assert list(claims.held()) == [3]
    claim.release()
    claims.tidy()
    assert list(tmp_path.iterdir()) == []


def test_another_systems_claim_is_taken_after_a_long_silence(tmp_path):
    claims = Claims(tmp_path)
    path = claims.folder / "000007.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"system": "0badcafe", "host": "other", "pid": 1}))
    assert SYSTEM != "0badcafe"
    assert claims.take(7) is None
    assert claims.held() == {7: "process 1 on other"}
    long_ago = time.time() - STALE - 5
    os.utime(path, (long_ago, long_ago))
    assert claims.take(7) is not None


def test_a_claim_that_says_nothing_is_taken_after_a_long_silence(tmp_path):
    claims = Claims(tmp_path)
    path = claims.folder / "000007.json"
    path.parent.mkdir()
    path.write_bytes(b"")
    assert claims.take(7) is None
    long_ago = time.time() - STALE - 5
    os.utime(path, (long_ago, long_ago))
    assert claims.take(7) is not None


def test_a_claim_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr("amed_engine.datasets.claims.BEAT", 0.01)
    claim = Claims(tmp_path).take(0)
    os.utime(claim.path, (1, 1))
    until = time.monotonic() + 10
    while claim.path.stat().st_mtime < 100 and time.monotonic() < until:
        time.sleep(0.01)
    assert claim.path.stat().st_mtime > 100
    claim.release()


def test_what_others_took_over_is_not_released(tmp_path):
    claims = Claims(tmp_path)
    claim = claims.take(0)
    claim.path.unlink()  # as one does that saw no sign of life
    other = claims.take(0)
    claim.release()
    assert list(claims.held()) == [0]
    other.release()
    assert claims.held() == {}


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    claims = Claims(tmp_path)
    claim = claims.take(0)
    assert claim is not None
    assert claims.take(0) is None
    claim.release()
    assert list(claims.folder.iterdir()) == []
