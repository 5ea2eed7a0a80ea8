"""Folders are of one save: never one's weights with another's configuration, whoever writes, is stopped or killed meanwhile."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import saved
from safetensors.torch import save_file
from saved import KINDS, content, predictor

from amed_engine import FileFormatError, Sampler, from_pretrained, load_predictor
from amed_engine import save_pretrained as save
from amed_engine.checkpoints import hashes

HEX = r"[0-9a-f]{64}"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch, off_checkout):
    """Folders that nobody is writing are mixed for good."""
    monkeypatch.setattr(hashes, "SECONDS", 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_two_saves_are_refused(tmp_path, kind):
    for seed in (0, 1):
        save(KINDS[kind](seed), tmp_path / str(seed))
    names = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*.*") if path.is_file())
    for name in names:
        kept = (tmp_path / "0" / name).read_bytes()
        (tmp_path / "0" / name).write_bytes((tmp_path / "1" / name).read_bytes())
        if kept != (tmp_path / "0" / name).read_bytes():
            with pytest.raises(FileFormatError, match=rf"{HEX}.*{HEX}.*not of one save.*save the folder again"):
                from_pretrained(tmp_path / "0")
        (tmp_path / "0" / name).write_bytes(kept)
    assert content(from_pretrained(tmp_path / "0")) == content(KINDS[kind](0))


def test_weights_of_an_older_version_under_a_newer_configuration_are_refused(tmp_path):
    save(predictor(0), tmp_path)
    save_file(predictor(1).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(FileFormatError, match="not of one save"):
        load_predictor(tmp_path)
    save_file(
        predictor(0).state_dict(), tmp_path / "model.safetensors"
    )  # without a header of ours, and the same numbers
    assert content(load_predictor(tmp_path)) == content(predictor(0))


def outcome(folder: Path) -> tuple | str:
    """What a folder loads as, or why it does not."""
    try:
        return content(from_pretrained(folder))
    except FileFormatError as error:
        return "not of one save" if "not of one save" in str(error) else str(error)


def interrupted(save_it: Callable[[], None], at: int, monkeypatch) -> None:
    """Save, and stop before the rename of this number."""
    renames, plain = [], os.replace

    def stop(*names, **options):
        renames.append(names)
        if len(renames) > at:
            raise KeyboardInterrupt
        plain(*names, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            save_it()


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_was_stopped_between_two_renames_is_refused_until_the_next(tmp_path, kind, monkeypatch):
    folder, count = tmp_path / "f", {"wrapped": 3, "diffusers": 4}.get(kind, 2)
    first = {"wrapped": (0, 1)}.get(kind, (0,))  # renames that leave the first whole: their tables are the same
    for at in range(count):
        save(KINDS[kind](0), folder)
        interrupted(lambda: save(KINDS[kind](1), folder), at, monkeypatch)
        loaded = outcome(folder)
        assert loaded == (content(KINDS[kind](0)) if at in first else "not of one save")
    assert not list(folder.glob(".*"))
    save(KINDS[kind](1), folder)
    assert content(from_pretrained(folder)) == content(KINDS[kind](1))


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}]
import amed_engine, saved as this
plain = os.replace
def replace(*names, **options):
    plain(*names, **options)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
amed_engine.save_pretrained(this.predictor(1), {folder!r})
"""


def test_a_process_killed_between_the_renames_leaves_no_folder_that_loads(tmp_path):
    save(predictor(0), tmp_path / "p")
    code = KILLED.format(here=str(Path(saved.__file__).parent), folder=str(tmp_path / "p"))
    done = subprocess.run([sys.executable, "-P", "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(FileFormatError, match="not of one save"):
        load_predictor(tmp_path / "p")
    with pytest.raises(FileFormatError, match="not of one save"):
        Sampler("digits", predictor=tmp_path / "p", nfe=5)
    assert list((tmp_path / "p").glob(".amed-tmp.*"))
    save(predictor(1), tmp_path / "p")
    assert content(load_predictor(tmp_path / "p")) == content(predictor(1))
    assert not list((tmp_path / "p").glob(".amed-tmp.*"))


def test_a_reader_waits_for_the_second_file(tmp_path, monkeypatch):
    """Mixed for its first two looks, whole in the third."""
    for seed in (0, 1):
        save(predictor(seed), tmp_path / str(seed))
    save(predictor(0), tmp_path / "p")
    weights = (tmp_path / "1/model.safetensors").read_bytes()
    (tmp_path / "p/model.safetensors").write_bytes(weights)
    looks, plain = [], time.sleep

    def finish(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            (tmp_path / "p/config.json").write_bytes((tmp_path / "1/config.json").read_bytes())
        plain(0)

    monkeypatch.setattr(hashes, "SECONDS", 60.0)
    monkeypatch.setattr(time, "sleep", finish)
    assert content(load_predictor(tmp_path / "p")) == content(predictor(1))
    assert len(looks) == 2


WRITER = """
import sys
sys.path[:0] = [{here!r}]
import amed_engine, saved as this
items = [this.KINDS[{kind!r}](seed) for seed in (0, 1)]
print("ready", flush=True)
for k in range({count}):
    amed_engine.save_pretrained(items[k % 2], {folder!r})
"""


@pytest.mark.parametrize(("kind", "writers"), [*((kind, 1) for kind in KINDS), ("predictor", 2)])
def test_readers_beside_writers_see_one_of_the_two_and_nothing_else(tmp_path, kind, writers, monkeypatch):
    monkeypatch.setattr(hashes, "SECONDS", 1.0)
    save(KINDS[kind](0), tmp_path / "f")
    known = [content(KINDS[kind](seed)) for seed in (0, 1)]
    code = WRITER.format(here=str(Path(saved.__file__).parent), kind=kind, count=60, folder=str(tmp_path / "f"))
    running = [subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE) for _ in range(writers)]
    for each in running:
        assert each.stdout.readline() == b"ready\n"
    seen = set()
    while any(each.poll() is None for each in running):
        seen.add(outcome(tmp_path / "f"))
    assert [each.wait() for each in running] == [0] * writers
    # Of two writers the last configuration may be for the other's weights.
    assert set(known) <= seen <= {*known, *(["not of one save"] if writers == 2 else [])}
    save(KINDS[kind](1), tmp_path / "f")
    assert content(from_pretrained(tmp_path / "f")) == known[1]


def test_a_folder_that_takes_longer_than_the_second_is_looked_at_again_all_the_same(monkeypatch):
    clock, tries = iter(range(0, 100, 10)), []  # each look takes ten seconds

    def load():
        tries.append(1)
        if len(tries) == 1:
            raise hashes.MixedError("half of it was saved")
        return "whole"

    monkeypatch.setattr(hashes.time, "monotonic", lambda: next(clock))
    assert hashes.settled(load) == "whole"
