"""Temporary files: whole or not at all, and swept only where nobody writes to them."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from amed_engine.solvers import temporary
from amed_engine.solvers.files import atomic_write
from amed_engine.solvers.temporary import PREFIX, STALE, SYSTEM, Temporary, sweep

WRITER = """
import sys, time
from pathlib import Path
from amed_engine.solvers.temporary import Temporary
made = Temporary(Path(sys.argv[1]), folder=sys.argv[2] == "folder")
(made.path / "x" if made.folder else made.path).write_bytes(b"half")
print(made.path, flush=True)
time.sleep(60)
"""


def start(target, kind):
    writer = subprocess.Popen([sys.executable, "-P", "-c", WRITER, target, kind], stdout=subprocess.PIPE, text=True)
    return writer, writer.stdout.readline().strip()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_sweep_takes_what_a_killed_writer_left_and_nothing_else(tmp_path, kind):
    (tmp_path / f"{PREFIX[:-1]}").write_text("mine")  # nearly such a name
    (tmp_path / ".x.tmp").write_text("mine")
    (tmp_path / "x").write_text("mine")
    before = set(tmp_path.iterdir())
    writer, path = start(tmp_path / "x", kind)
    try:
        assert sweep(tmp_path) == []
        assert os.path.exists(path)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    assert sweep(tmp_path, "y") == []
    assert [str(found) for found in sweep(tmp_path, "x")] == [path]
    assert set(tmp_path.iterdir()) == before


def test_another_systems_file_is_left_until_it_was_silent_for_long(tmp_path, monkeypatch):
    left = tmp_path / f"{PREFIX}0badcafe-12345678.x"
    left.write_bytes(b"half")
    assert SYSTEM != "0badcafe"
    assert sweep(tmp_path) == []
    long_ago = time.time() - STALE - 5
    os.utime(left, (long_ago, long_ago))
    assert sweep(tmp_path) == [left]


def test_without_locks_its_own_files_have_to_be_silent_as_well(tmp_path, monkeypatch):
    def unsupported(handle, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(temporary.fcntl, "flock", unsupported)
    made = Temporary(tmp_path / "x")
    assert sweep(tmp_path) == []
    long_ago = time.time() - STALE - 5
    os.utime(made.path, (long_ago, long_ago))
    made.beat()
    assert sweep(tmp_path) == []
    os.utime(made.path, (long_ago, long_ago))
    assert sweep(tmp_path) == [made.path]
    made.discard()  # what is gone already is no error


def test_a_folder_appears_whole(tmp_path):
    with Temporary(tmp_path / "deep" / "x", folder=True) as made:
        (made.path / "a").mkdir()
        (made.path / "a" / "b").write_bytes(b"1")
        made.flush()
        assert not made.target.exists()
        made.publish()
    assert (tmp_path / "deep" / "x" / "a" / "b").read_bytes() == b"1"
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["x"]


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_leaves_nothing_and_names_the_target(tmp_path, folder):
    with pytest.raises(OSError, match="No space left") as caught, Temporary(tmp_path / "x", folder):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_between_making_and_locking_costs_the_writer_nothing(tmp_path, monkeypatch):
    taken = []

    def swept(handle, wait=False, real=temporary.lock):
        if wait and not taken:
            taken.extend(sweep(tmp_path))
        return real(handle, wait)

    monkeypatch.setattr(temporary, "lock", swept)
    atomic_write(tmp_path / "x", b"whole")
    assert len(taken) == 1
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_sweep_between_making_and_opening_a_folder_costs_the_writer_nothing(tmp_path, monkeypatch):
    calls, taken = [], []

    def swept(name, flags, *rest, real=os.open):
        calls.append(name)
        if len(calls) == 1:
            taken.extend(sweep(tmp_path))
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", swept)
    with Temporary(tmp_path / "x", folder=True) as made:
        made.publish()
    assert len(taken) == 1
    assert [found.name for found in tmp_path.iterdir()] == ["x"]


def test_long_names_are_possible(tmp_path):
    name = "n" * 250
    atomic_write(tmp_path / name, b"1")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    Temporary(tmp_path / name)._release()  # as a killed writer leaves it
    assert len(sweep(tmp_path, name)) == 1


def test_the_mode_is_what_the_umask_says(tmp_path):
    mask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "x", b"1")
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
