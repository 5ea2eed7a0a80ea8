"""Ctrl-C and SIGTERM of any command, where what runs does not take them itself."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STDERR, INTERRUPTED = 2, 130
IMPORTING = "<frozen importlib._bootstrap>"  # the file of the frames that import a module


@contextlib.contextmanager
def interruptible(number: signal.Signals) -> Iterator[None]:
    """The signal is a KeyboardInterrupt meanwhile, in the main thread, and where others have not taken or ignored it.

    While a module is imported it ends the process at once, with exit code 130: compiled modules abort it where an exception
    passes through their initialisation (torch 2.13: SIGABRT), and Python gives another exit code to one that passed `exec`.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler):
        yield
        return
    before = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            with contextlib.suppress(OSError):
                os.write(STDERR, b"amed: error: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
