"""Every option that writes, with every kind of node for its name: refused by a sentence or streamed to, never replaced."""

import os
import signal
import stat
import subprocess
import sys

import click
import pytest
from nodes import REFUSED, STREAMED, Reader

from amed_engine import cli
from amed_engine.checkpoints import save_model
from amed_engine.engine.model import Model
from amed_engine.solvers.temporary import PREFIX, Temporary

TINY = ("--model", "{model}", "--device", "cpu")
FREE = (*TINY, "--solver", "euler", "--nfe", 2)
SAMPLES = ("sample", *FREE, "--seeds", "0-1")
COMPARE = ("compare", *TINY, "--nfe", 2, "--samples", 2, "--curve-samples", 0, "--seeds", "0-1")
EVALUATE = ("evaluate", *FREE, "--seeds", "0-3")
FIT = ("fit", *TINY, "--samples", 8, "--batch", 8, "--starts", 1, "--early", 0, "--late", 1, "--teacher-nfe", 4)
DISTILL = ("distill", *TINY, "--nfe", 3, "--kimg", 0.008, "--batch", 8)
GENERATE = ("generate", *FREE, "--seeds", "0-1")
CALIBRATE = ("calibrate", *TINY)
LOAD = ("bench-serve", *FREE, "--saturate", "--requests", 2)
P = "{tmp}/p.safetensors"

# (command, option) -> what is run, the name's suffix
FILES = {
    ("sample", "--out"): (SAMPLES, ".png"),
    ("compare", "--out"): (COMPARE, ".png"),
    ("compare", "--json"): (COMPARE, ".json"),
    ("evaluate", "--save-statistics"): (EVALUATE, ".npz"),
    ("evaluate", "--json"): (EVALUATE, ".json"),
    ("search-schedule", "--out"): (("search-schedule", *TINY, "--nfe", 2, "--samples", 4, "--grid", 9), ".json"),
    ("calibrate", "--out"): ((*CALIBRATE, "--nfe", 1), ".json"),
    ("fit", "--out"): ((*FIT, "--nfe", 2), ".safetensors"),
    ("distill", "--out"): (DISTILL, ".safetensors"),
    ("convert", "--out"): (("convert", "{published}"), ".safetensors"),
    ("generate", "--json"): ((*GENERATE, "--out", "{tmp}/data"), ".json"),
    ("export", "--out"): (("export", *FREE, "--format", "plan"), ".json"),
    ("bench-serve", "--json"): (LOAD, ".json"),
}
UNSTREAMED = {("export", "--out")}  # read back and compared, or several files
# (command, option) -> what is run, a file that it writes in the folder
FOLDERS = {
    ("sample", "--outdir"): (SAMPLES, "000001.png"),
    ("calibrate", "--out"): ((*CALIBRATE, "--nfe", "1-2"), "nfe2.json"),
    ("fit", "--out"): ((*FIT, "--nfe", "2-3"), "nfe3.safetensors"),
    ("distill", "--out"): (DISTILL, "config.json"),
    ("distill", "--out-dir"): ((*DISTILL, "--out", P), "history.csv"),
    ("convert", "--out"): (("convert", "{published}"), "model.safetensors"),
    ("generate", "--out"): (GENERATE, "manifest.json"),
    ("reproduce", "--outdir"): (("reproduce", "cifar10-amed-5", "--images", 2), None),  # its weights are not at hand
}


@pytest.fixture
def run(amed, tiny_model, tmp_path, publish):
    """Runs a command with {model}, {published} and {tmp} filled in; one that hangs fails."""
    folder = tmp_path / "given"
    folder.mkdir()
    save_model(tiny_model, folder / "m.safetensors")
    places = {
        "model": folder / "m.safetensors",
        "published": publish.edm(tiny_model, folder / "edm-tiny.pkl"),
        "tmp": tmp_path,
    }

    def late(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield lambda *args: amed(*(str(arg).format(**places) for arg in args))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def no_work(monkeypatch):
    """A network that is asked before the name is looked at fails the test."""
    monkeypatch.setattr(Model, "denoise", lambda *_: pytest.fail("it worked first"))


def test_no_option_that_writes_is_forgotten():
    found = {
        (name, option.opts[0])
        for name, command in cli.app.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and isinstance(option.type, click.Path) and not option.type.exists
    }
    assert found == FILES.keys() | FOLDERS.keys()


def check_refused(node, message, run, *args):
    before = os.lstat(node)
    code, out, err = run(*args)
    assert (code, out) == (2, ""), err
    assert message in err.splitlines()[-1] or "is a directory" in err.splitlines()[-1]  # click's own words
    assert "Traceback" not in err
    assert os.path.samestat(os.lstat(node), before)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize(("command", "option"), FILES)
def test_nodes_are_refused_before_the_work(run, tmp_path, no_work, command, option, kind):
    args, suffix = FILES[command, option]
    node, (make, message) = tmp_path / f"x{suffix}", REFUSED[kind]
    make(node)
    check_refused(node, message, run, *args, option, node)
    assert {path.name for path in tmp_path.iterdir()} == {node.name, "given"}


@pytest.mark.parametrize(("command", "option"), FILES)
def test_a_fifo_without_a_reader_is_refused_before_the_work(run, tmp_path, no_work, command, option):
    args, suffix = FILES[command, option]
    node = tmp_path / f"x{suffix}"
    os.mkfifo(node)
    check_refused(node, "is a FIFO", run, *args, option, node)


@pytest.mark.parametrize(("command", "option"), FILES)
def test_single_files_are_streamed_to_devices_and_fifos(run, tmp_path, command, option):
    args, suffix = FILES[command, option]
    fifo, device = tmp_path / f"f{suffix}", tmp_path / f"d{suffix}"
    os.mkfifo(fifo)
    device.symlink_to("/dev/null")
    with Reader(fifo) as got:
        code, _, err = run(*args, option, fifo)
    expected = 2 if (command, option) in UNSTREAMED else 0
    assert code == expected, err
    assert bool(got) == (expected == 0)
    code, _, err = run(*args, option, device, *(["--overwrite"] if command == "generate" else []))
    assert code == expected, err
    assert stat.S_ISFIFO(os.lstat(fifo).st_mode)
    assert os.readlink(device) == "/dev/null"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(("command", "option"), FILES)
def test_a_link_is_followed_and_the_litter_of_killed_runs_removed(run, tmp_path, command, option):
    args, suffix = FILES[command, option]
    (tmp_path / "away").mkdir()
    link, target = tmp_path / f"x{suffix}", tmp_path / "away" / f"t{suffix}"
    link.symlink_to(target)
    for name in (target, target.with_name("another")):
        Temporary(name)._release()  # as a killed run leaves it
    code, _, err = run(*args, option, link)
    assert code == 0, err
    assert link.is_symlink()
    assert target.stat().st_size
    (left,) = [path.name for path in target.parent.iterdir() if path != target]
    assert left.startswith(PREFIX)
    assert left.endswith(".another")


@pytest.mark.parametrize("kind", [*STREAMED, *(kind for kind in REFUSED if kind != "folder")])
@pytest.mark.parametrize(("command", "option"), FOLDERS)
def test_a_node_is_no_folder(run, tmp_path, no_work, command, option, kind):
    make, message = REFUSED.get(kind) or (STREAMED[kind], "expected a folder")
    node = tmp_path / "x"
    make(node)
    if kind == "link into nowhere":
        message = "which does not exist"
    check_refused(node, message, run, *FOLDERS[command, option][0], option, node)


@pytest.mark.parametrize("kind", [*STREAMED, *REFUSED])
@pytest.mark.parametrize(("command", "option"), [key for key, (_, name) in FOLDERS.items() if name])
def test_a_node_in_a_folder_is_not_replaced(run, tmp_path, no_work, command, option, kind):
    make, message = REFUSED.get(kind) or (STREAMED[kind], "is a ")
    args, name = FOLDERS[command, option]
    node = tmp_path / "x" / name
    node.parent.mkdir()
    make(node)
    check_refused(node, message, run, *args, option, node.parent)
    assert [path.name for path in node.parent.iterdir()] == [name]


@pytest.mark.parametrize(("command", "option"), [key for key in FOLDERS if key[0] not in ("reproduce", "generate")])
def test_the_litter_of_killed_runs_in_a_folder_is_removed(run, tmp_path, command, option):
    args, name = FOLDERS[command, option]
    folder = tmp_path / "x"
    Temporary(folder / "whatever")._release()
    code, _, err = run(*args, option, folder)
    assert code == 0, err
    assert (folder / name).is_file()
    assert not list(folder.glob(f"{PREFIX}*"))


@pytest.mark.parametrize(("command", "option"), [key for key in FILES if key[0] in ("compare", "calibrate")])
def test_dev_stdout_is_for_bytes_alone(tmp_path, command, option, tiny_model):
    """What is printed beside goes to stderr."""
    save_model(tiny_model, tmp_path / "m.safetensors")
    args = [str(arg).format(model=tmp_path / "m.safetensors") for arg in FILES[command, option][0]]
    line = [sys.executable, "-P", "-m", "amed_engine", *args, option]
    done = subprocess.run([*line, "/dev/stdout"], capture_output=True, check=True)
    code = subprocess.run([*line, str(tmp_path / "x")], capture_output=True, check=True)
    assert done.stdout == (tmp_path / "x").read_bytes()
    assert len(done.stderr.splitlines()) >= len(code.stdout.splitlines()) > 0
