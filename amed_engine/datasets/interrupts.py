"""Ctrl-C and SIGTERM: the first finishes what is open, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

STDERR, HEARD = 2, b"\nfinishing the open shard; interrupt again to give it up and end at once\n"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
