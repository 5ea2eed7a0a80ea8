"""How far a dataset is: a bar where stderr is a terminal, else a line every half minute."""

from __future__ import annotations

import contextlib
import sys
import threading
import time

from tqdm import tqdm

EVERY = 30.0  # seconds between lines


class Progress:
    """Samples there are, and images a second of drawing and of writing, each while it was at it. Takes counts from any thread.

    total, there: samples wanted, and those that others made, see `found`. shown: False says nothing, nor does a closed stderr.
    """

    def __init__(self, total: int, there: int, shown: bool):
        self.total, self.there, self._before = total, there, there
        stderr = sys.stderr  # None, or closed, where a host has it so
        self.shown = shown and stderr is not None and not stderr.closed
        self.samples = {"drawing": 0, "writing": 0}
        self.seconds = {"drawing": 0.0, "writing": 0.0}
        self.done = 0  # samples in shards that this run finished
        self._lock = threading.Lock()
        self._started = self._said = time.monotonic()
        terminal = stderr is not None and self.shown and stderr.isatty()
        self._bar = tqdm(total=total, initial=there, desc="generate", unit="image") if terminal else None

    def drew(self, samples: int, seconds: float) -> None:
        self._count("drawing", samples, seconds)

    def wrote(self, samples: int, seconds: float) -> None:
        self._count("writing", samples, seconds)

    def published(self, samples: int) -> None:
        """A shard of so many samples is there now."""
        with self._lock:
            self.done += samples

    def found(self, samples: int) -> None:
        """So many are there, of this run and of all others."""
        with self._lock:
            self.there = max(self.there, samples - self.samples["writing"])

    def rate(self, what: str) -> float:
        """Images a second."""
        return self.samples[what] / self.seconds[what] if self.seconds[what] else 0.0

    @property
    def rates(self) -> str:
        return ", ".join(f"{what} {self.rate(what):.1f} images/s" for what in self.samples)

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.close()

    def _count(self, what: str, samples: int, seconds: float) -> None:
        with self._lock:
            self.samples[what] += samples
            self.seconds[what] += seconds
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone is no reason to end
                self._show()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self.rates, refresh=False)
            self._bar.update(self.there + self.samples["writing"] - self._bar.n)
        elif self.shown and time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            now = self.there + self.samples["writing"]
            left = (self.total - now) * (self._said - self._started) / max(now - self._before, 1)
            sys.stderr.write(f"generate: {now:,} of {self.total:,}, {self.rates}, {left:.0f} s left\n")
            sys.stderr.flush()
