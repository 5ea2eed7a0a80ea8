"""Ctrl-C and SIGTERM of any command; what they do to datasets and servers is tested there."""

import functools
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_middle_of_a_file_leaves_nothing_of_it(tmp_path, number):
    line = [sys.executable, "-P", "-m", "amed_engine", "sample", "--seeds", "0-9999", "--nfe", "1", "--solver", "euler"]
    line += ["--no-afs", "--device", "cpu", "--out", str(tmp_path / "s.npz")]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whatever started the tests ignores
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "amed: error: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_an_exception_but_for_imports(tmp_path):
    (tmp_path / "sent.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(2)\nexcept BaseException:\n    pass\n"
    )
    script = """
import signal, sys
from amed_engine.cli.interrupts import interruptible

for number in (signal.SIGINT, signal.SIGTERM):
    before = signal.getsignal(number)
    with interruptible(number):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            print("an exception", flush=True)
    assert signal.getsignal(number) is before
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with interruptible(signal.SIGTERM):
    signal.raise_signal(signal.SIGTERM)
sys.path.insert(0, sys.argv[1])
with interruptible(signal.SIGINT):
    import sent
print("not reached")
"""
    done = subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "an exception\nan exception\n")
    assert done.stderr == "amed: error: interrupted\n"
