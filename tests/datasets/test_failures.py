"""Whatever step fails: one error, no litter, and a folder that the same call completes."""

import builtins
import contextlib
import errno
import fcntl
import functools
import io
import os
import shutil
import signal
import threading

import numpy as np
import pytest

from amed_engine import AmedError, ConfigError, Sampler, generate_dataset
from amed_engine.datasets.drawing import Missing
from amed_engine.datasets.folder import open_folder
from amed_engine.datasets.formats.npz import NpzWriter
from amed_engine.datasets.generate import make_job, open_made
from amed_engine.datasets.interrupts import Interrupts
from amed_engine.datasets.job import difference, place
from amed_engine.datasets.ledger import Ledger
from amed_engine.datasets.progress import Progress
from amed_engine.datasets.seeds import Seeds
from amed_engine.datasets.sources import open_source
from amed_engine.datasets.verify import verify_samples
from amed_engine.datasets.workers import draw_in_workers

SMALL = {"format": "npz", "shard": 4, "batch": 4}
CALLS = [(os, name) for name in ("open", "link", "replace", "fsync", "unlink", "mkdir", "utime")]


def denoiser(x, sigma):
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


@pytest.fixture(scope="module")
def tiny():
    return Sampler(denoiser, solver="ipndm", nfe=3, shape=(1, 4, 4), sigma_min=0.5, sigma_max=1.0)


def fail(error, *_):
    raise error


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("whole") / "data"
    generate_dataset(tiny, "0-7", folder, **SMALL)
    return folder


def shards(folder):
    """All files but the manifest and the ledger, litter included."""
    named = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return {name: path.read_bytes() for name, path in named.items() if name not in ("manifest.json", "ledger.jsonl")}


def failing(monkeypatch, number):
    """The call of this number to the operating system fails; a list of what was called."""
    called = []

    def one(real, name):
        def call(*arguments, **options):
            called.append(name)
            if len(called) == number:
                raise OSError(errno.EIO, "Input/output error", str(arguments[0]))
            return real(*arguments, **options)

        return call

    for module, name in [*CALLS, (fcntl, "flock"), (builtins, "open"), (io, "open")]:
        monkeypatch.setattr(module, name, one(getattr(module, name), name))
    return called


@pytest.mark.parametrize("overwrite", [False, True])
def test_whatever_call_fails_nothing_is_left_and_the_rest_is_drawn(tiny, whole, tmp_path, monkeypatch, overwrite):
    number, made = 0, shards(whole)
    while True:
        number, folder = number + 1, tmp_path / "data"
        if overwrite:
            shutil.copytree(whole, folder)
        with monkeypatch.context() as patched:
            called = failing(patched, number)
            with contextlib.suppress(OSError, AmedError):
                generate_dataset(tiny, "0-7", folder, **SMALL, overwrite=overwrite)
        if len(called) < number:
            break
        if folder.exists():
            assert shards(folder).keys() <= made.keys(), (number, called[number - 1])
        assert generate_dataset(tiny, "0-7", folder, **SMALL).samples == 8, (number, called[number - 1])
        assert shards(folder) == made, (number, called[number - 1])
        shutil.rmtree(folder)
    assert number > 30


def test_an_error_releases_the_claims_of_shards_that_wait(tiny, tmp_path, monkeypatch):
    gone, real = threading.Event(), NpzWriter.close

    def close(self):
        gone.wait(2)  # until the next shard has been claimed
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(NpzWriter, "close", close)
    with pytest.raises(OSError, match="No space"):
        generate_dataset(tiny, "0-39", tmp_path, **SMALL)
    monkeypatch.setattr(NpzWriter, "close", real)
    report = generate_dataset(tiny, "0-39", tmp_path, **SMALL)
    assert (report.samples, report.in_other_hands) == (40, 0)


def test_the_second_name_of_a_manifest_whose_making_was_killed_is_removed(tiny, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    os.link(tmp_path / "data" / "manifest.json", tmp_path / "data" / f".amed-tmp.{'0' * 8}-01234567.manifest.json")
    os.utime(tmp_path / "data" / "manifest.json", (1, 1))
    generate_dataset(tiny, "0-7", tmp_path / "data", **SMALL)
    assert shards(tmp_path / "data") == shards(whole)


def in_workers(source, making, folder, seeds="0-7"):
    """What two workers said, this process being the first, and how many samples are there."""
    source = open_source(source)
    job, _ = make_job(source, Seeds.of(seeds), None, "npz", 4, 4, 1)
    missing, shown = Missing(folder, job), Progress(len(job.seeds), 0, shown=False)
    errors = draw_in_workers(2, making, missing, source, None, shown, threading.Event())
    missing.refresh()
    return errors, missing.samples


def test_this_process_draws_what_a_worker_that_ends_without_a_word_does_not(tiny, tmp_path):
    errors, samples = in_workers(tiny, functools.partial(os._exit, 3), tmp_path)
    assert [error.split(",")[0] for error in errors] == ["a worker ended with exit code 3"]
    assert samples == 8


def test_a_worker_draws_what_this_process_cannot(making, tmp_path, monkeypatch):
    monkeypatch.setattr(NpzWriter, "add", functools.partial(fail, OSError(errno.EIO, "Input/output error")))
    errors, samples = in_workers(making(), functools.partial(open_made, making, 1, None, None, {}), tmp_path)
    assert len(errors) == 1
    assert "Input/output error" in errors[0]
    assert samples == 8


def test_no_more_workers_than_shards_are_started(making, tmp_path, monkeypatch):
    monkeypatch.setattr("amed_engine.datasets.generate.draw_in_workers", lambda *_: pytest.fail("one shard, no worker"))
    assert generate_dataset(making, "0-3", tmp_path, **SMALL, workers=99).samples == 4


def test_a_run_that_lacks_shards_is_no_success(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("amed_engine.datasets.generate.draw_missing", lambda *_: None)
    with pytest.raises(AmedError, match="2 shards are missing, all others are kept"):
        generate_dataset(tiny, "0-7", tmp_path, **SMALL)


def test_a_folder_is_not_overwritten_while_a_run_has_it_open(tiny, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    source = open_source(tiny)
    job, _ = make_job(source, Seeds.of("0-7"), None, "npz", 4, 4, 1)
    with (
        open_folder(tmp_path / "data", job, place(source.identity, source.device)),
        pytest.raises(ConfigError, match="is being drawn into by another process"),
    ):
        generate_dataset(tiny, "0-3", tmp_path / "data", **SMALL, overwrite=True)
    assert shards(tmp_path / "data") == shards(whole)
    assert generate_dataset(tiny, "0-3", tmp_path / "data", **SMALL, overwrite=True).samples == 4


def test_damage_is_checked_before_the_surroundings_are_compared(tiny, whole, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(whole, folder)
    content = bytearray((folder / "shard-000000.npz").read_bytes())
    content[-300] ^= 1
    (folder / "shard-000000.npz").write_bytes(content)
    assert generate_dataset(tiny, "0-7", folder, **SMALL, check=True).drawn == 4  # a function is compared each time
    assert shards(folder) == shards(whole)


def test_what_a_model_is_called_makes_no_other_job(sampler, tmp_path):
    told = {"format": "npz", "shard": np.int64(10), "batch": np.uint8(10), "workers": np.int32(1)}
    generate_dataset(sampler, "0-19", tmp_path, **told)
    before = shards(tmp_path)
    (tmp_path / "shard-000001.npz").unlink()
    other = Sampler(sampler.model.network, sampler.running()[1])
    assert open_source(other).identity["model"] != "digits"
    assert generate_dataset(other, np.arange(20), tmp_path, **told, verify=np.int64(20)).verified == 20
    assert shards(tmp_path) == before
    job, _ = make_job(open_source(sampler), Seeds.of("0-19"), None, "npz", 10, 10, 1)
    unknown = [type(job)(**{**vars(job), "source": {"model": name, "fingerprint": None}}) for name in "ab"]
    assert "source.model" in (difference(*unknown) or "")


def test_an_interrupt_ends_the_verification(tiny, whole):
    source = open_source(tiny)
    job, _ = make_job(source, Seeds.of("0-7"), None, "npz", 4, 4, 1)
    answers = iter([False, True])
    assert verify_samples(whole, job, source, None, 8, lambda: next(answers)) == 4


@pytest.mark.parametrize(("name", "make"), [("ledger.jsonl", os.mkfifo), ("claims", os.mkfifo)])
def test_a_pipe_in_the_place_of_a_part_is_refused(tiny, whole, tmp_path, name, make):
    shutil.copytree(whole, tmp_path / "data")
    path = tmp_path / "data" / name
    path.unlink(missing_ok=True)
    make(path)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=name):
            generate_dataset(tiny, "0-7", tmp_path / "data", **SMALL, overwrite=overwrite)
    assert path.is_fifo()


def test_shards_of_others_are_looked_at_one_by_one(tiny, tmp_path, monkeypatch):
    looked, real = [], Ledger.refresh

    def refresh(self):
        looked.append(0)
        return real(self)

    monkeypatch.setattr(Ledger, "refresh", refresh)
    generate_dataset(tiny, "0-39", tmp_path, **{**SMALL, "format": "npz"})
    assert len(looked) < 40


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


def test_a_line_every_half_minute_counts_what_others_drew(capsys, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("amed_engine.datasets.progress.time", clock)
    progress = Progress(1000, 100, shown=True)
    for now in range(5, 100, 5):
        clock.now = float(now)
        progress.drew(10, 1.0)
        progress.wrote(10, 0.5)
        progress.found(100 + 20 * now // 5)  # as many by another process
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "generate: 200 of 1",
        "generate: 320 of 1",
        "generate: 440 of 1",
    ]
    assert "drawing 10.0 images/s, writing 20.0 images/s" in lines[0]


def test_progress_without_a_stderr_says_nothing(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    progress = Progress(10, 0, shown=True)
    progress.drew(10, 1.0)
    progress.close()


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupts.asked.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
