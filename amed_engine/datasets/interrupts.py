"""Ctrl-C and SIGTERM: the first finishes what is open, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

STDERR, INTERRUPTED = 2, 130
HEARD = b"\nfinishing the open shard; interrupt again to give it up and end at once\n"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMPORTING = "<frozen importlib._bootstrap>"  # the file of the frames that import a module


class Interrupts:
    """As a context in the main thread it takes the signals; `asked` is set by the first. Elsewhere it takes none, nor
    those that are ignored, as Ctrl-C is by what a script started in the background.

    said: answer the first one on stderr.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS, said: bool = False) -> None:
        self.signals, self.said = signals, said
        self.asked = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in self.signals if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._take) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked.is_set():
            raise KeyboardInterrupt
        self.asked.set()
        if self.said:
            with contextlib.suppress(OSError):
                os.write(STDERR, HEARD)  # a print is not safe here


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
