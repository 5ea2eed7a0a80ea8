"""What a name that is to be written stands for: files are replaced whole, nodes never."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys

import pytest
from nodes import REFUSED, STREAMED, Reader

from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.solvers.files import atomic_write, whole, write_or_stream
from amed_engine.solvers.targets import (
    check_folder,
    check_source,
    check_target,
    held,
    is_descriptor,
    is_stream,
    resolved,
)
from amed_engine.solvers.temporary import PREFIX, Temporary

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs nodes in file systems")


@pytest.fixture(autouse=True)
def _no_hang():
    """What would wait for a reader for ever fails."""

    def late(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("write", [atomic_write, write_or_stream])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_file_is_refused_and_stays(tmp_path, kind, write):
    make, message = REFUSED[kind]
    make(tmp_path / "x")
    before = os.lstat(tmp_path / "x")
    for refused in (lambda: write(tmp_path / "x", b"new"), lambda: check_target(tmp_path / "x", streams=True)):
        with pytest.raises(ConfigError, match=message):
            refused()
    assert os.path.samestat(os.lstat(tmp_path / "x"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("make", STREAMED.values(), ids=STREAMED)
def test_parts_of_a_folder_are_files_and_are_not_streamed(tmp_path, make):
    make(tmp_path / "x")
    before = os.stat(tmp_path / "x")
    for refused in (
        lambda: atomic_write(tmp_path / "x", b"new"),
        lambda: check_folder(tmp_path, "y", "x"),
        lambda: check_folder(tmp_path / "x" / "deeper"),
        lambda: atomic_write(tmp_path / "x" / "y", b"new"),
        lambda: whole(tmp_path / "x").__enter__(),
    ):
        with pytest.raises(ConfigError, match=r"is a (FIFO|device), expected a (file|folder)"):
            refused()
    assert os.path.samestat(os.stat(tmp_path / "x"), before)


def test_a_device_gets_the_bytes_and_stays(tmp_path):
    (tmp_path / "x").symlink_to("/dev/null")
    check_target(tmp_path / "x", streams=True)
    write_or_stream(tmp_path / "x", b"new")
    write_or_stream("/dev/null", b"new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert os.readlink(tmp_path / "x") == "/dev/null"
    with pytest.raises(OSError, match="No space left") as caught:
        write_or_stream("/dev/full", b"new")
    assert caught.value.filename == "/dev/full"


def test_a_fifo_without_a_reader_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x")
    for refused in (lambda: write_or_stream(tmp_path / "x", b"new"), lambda: held(tmp_path / "x").__enter__()):
        with pytest.raises(ConfigError, match="nobody reads; start its reader first"):
            refused()
    assert stat.S_ISFIFO(os.stat(tmp_path / "x").st_mode)


@pytest.mark.parametrize("beforehand", [False, True])
def test_a_fifo_passes_all_bytes_on(tmp_path, beforehand):
    """Also where it was opened before the work: to open and close it would be the end of file to its reader."""
    os.mkfifo(tmp_path / "x")
    data = os.urandom(300_000)
    reader = Reader(tmp_path / "x")
    with held(tmp_path / "x") if beforehand else held(tmp_path / "nothing"), reader as got:
        write_or_stream(tmp_path / "x", data)
    assert got == data


def test_a_reader_that_leaves_is_an_error_that_names_the_fifo(tmp_path):
    os.mkfifo(tmp_path / "x")
    reader = os.open(tmp_path / "x", os.O_RDONLY | os.O_NONBLOCK)
    with held(tmp_path / "x"):
        os.close(reader)
        with pytest.raises(BrokenPipeError) as caught:
            write_or_stream(tmp_path / "x", b"new")
    assert caught.value.filename == str(tmp_path / "x")


@pytest.mark.parametrize("there", [True, False])
def test_links_stay_and_what_they_lead_to_is_written(tmp_path, there):
    (tmp_path / "data").mkdir()
    if there:
        (tmp_path / "data" / "x").write_bytes(b"old")
    (tmp_path / "second").symlink_to("data/x")
    (tmp_path / "first").symlink_to("second")
    check_target(tmp_path / "first")
    atomic_write(tmp_path / "first", b"new")
    assert (tmp_path / "data" / "x").read_bytes() == b"new"
    assert (os.readlink(tmp_path / "first"), os.readlink(tmp_path / "second")) == ("second", "data/x")
    with whole(tmp_path / "first") as file:
        file.write_bytes(b"newer")
        (file.parent / "first.data").write_bytes(b"beside")
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == {
        "x": b"newer",
        "first.data": b"beside",
    }


def test_a_file_beside_is_not_replaced_where_it_is_a_node(tmp_path):
    os.mkfifo(tmp_path / "x.data")

    def write():
        with whole(tmp_path / "x") as file:
            file.write_bytes(b"new")
            (file.parent / "x.data").write_bytes(b"beside")

    with pytest.raises(ConfigError, match=r"x\.data is a FIFO"):
        write()
    assert stat.S_ISFIFO(os.stat(tmp_path / "x.data").st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["x.data"]


def test_other_hard_links_keep_the_old_content(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    os.link(tmp_path / "a", tmp_path / "b")
    atomic_write(tmp_path / "a", b"new")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"new", b"old")


def test_a_folder_that_leads_nowhere_is_told(tmp_path):
    (tmp_path / "folder").symlink_to("missing")
    for refused in (lambda: check_folder(tmp_path / "folder"), lambda: atomic_write(tmp_path / "folder" / "x", b"1")):
        with pytest.raises(ConfigError, match=r"folder is a link to .*missing, which does not exist"):
            refused()
    (tmp_path / "missing").mkdir()
    check_folder(tmp_path / "folder")
    atomic_write(tmp_path / "folder" / "x", b"1")
    assert (tmp_path / "missing" / "x").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["n" * 256, "new/" + "n" * 256, "n" * 256 + "/x", "a\0b"])
def test_a_name_that_is_none_is_told_before_the_work(tmp_path, name):
    with pytest.raises(ConfigError, match=r"has a longer name than the file system takes|is no name of a file"):
        check_target(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_look_makes_no_folder_and_leaves_nothing(tmp_path):
    check_target(tmp_path / "a" / "b" / "x")
    check_folder(tmp_path / "a" / "b", "x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "regular").touch()
    with pytest.raises(NotADirectoryError):
        check_target(tmp_path / "regular" / "x")
    with pytest.raises(NotADirectoryError):
        check_folder(tmp_path / "regular")


def test_the_look_removes_what_killed_writers_left_of_the_file_or_in_the_folder(tmp_path):
    for name in ("x", "y"):
        Temporary(tmp_path / name)._release()  # as a killed writer leaves it
    check_target(tmp_path / "x")
    assert [path.name.rpartition(".")[2] for path in tmp_path.iterdir()] == ["y"]
    living = Temporary(tmp_path / "z")
    check_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [living.path]
    living.discard()


def test_an_export_removes_what_a_killed_one_left(tmp_path):
    Temporary(tmp_path / "x", folder=True)._release()
    with whole(tmp_path / "x") as file:
        assert len(list(tmp_path.glob(f"{PREFIX}*"))) == 1
        file.write_bytes(b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_write_that_is_cut_short_names_the_file_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            atomic_write(tmp_path / "x", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.filename == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


WRITER = "from amed_engine.solvers.files import write_or_stream; write_or_stream('/dev/stdout', b'b' * 100_000)"


@pytest.mark.parametrize("kind", ["pipe", "file", "appended file"])
def test_dev_stdout_is_what_the_shell_made_it(tmp_path, kind):
    (tmp_path / "x").write_bytes(b"aaa")
    with open(tmp_path / "x", "ab" if kind == "appended file" else "wb") as file:
        output = subprocess.PIPE if kind == "pipe" else file
        done = subprocess.run([sys.executable, "-P", "-c", WRITER], stdout=output, check=True)
    got = done.stdout if kind == "pipe" else (tmp_path / "x").read_bytes()
    assert got == (b"aaa" if kind == "appended file" else b"") + b"b" * 100_000


def test_names_of_open_files_are_known_through_links(tmp_path):
    (tmp_path / "link").symlink_to("/dev/stdout")
    (tmp_path / "x").touch()
    assert is_descriptor("/dev/stdout")
    assert is_descriptor(tmp_path / "link")
    assert not is_descriptor(tmp_path / "x")
    assert not is_stream(tmp_path / "x")
    with open(tmp_path / "x") as file:
        assert is_stream(f"/proc/self/fd/{file.fileno()}")
        with pytest.raises(ConfigError, match="an open file of a process"):
            resolved(f"/proc/self/fd/{file.fileno()}")


def test_what_is_read_is_a_file_or_a_folder(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in (("fifo", "a FIFO"), ("zero", "a device")):
        with pytest.raises(FileFormatError, match=f"{name} is {kind}, expected a file"):
            check_source(tmp_path / name)
    check_source(tmp_path)
    check_source(tmp_path / "missing")
