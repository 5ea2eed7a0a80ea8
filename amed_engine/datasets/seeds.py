"""The seeds of a dataset, as ranges: ten million of them take no more memory than ten."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import overload

from amed_engine.engine.seeds import LIMIT, check_seeds, parse_ranges
from amed_engine.errors import ConfigError

SHOWN = 5  # of the seeds that are named twice


class Seeds(Sequence[int]):
    """Different integers in 0 .. 2^32 - 1 in the order given; a slice is a list. `str` is EDM's notation, "0-49999,7e4".

    Raises ConfigError for none, for one out of range and for one named twice.
    """

    def __init__(self, ranges: Iterable[range]):
        self.ranges = list(ranges)
        if not self.ranges:
            raise ConfigError("got no seeds: ask for at least one sample")
        lowest, highest = min(part.start for part in self.ranges), max(part[-1] for part in self.ranges)
        check_seeds([lowest, highest])
        _check_once(sorted(self.ranges, key=lambda part: part.start))
        self._ends = list(itertools.accumulate(map(len, self.ranges)))

    @classmethod
    def of(cls, seeds: str | Iterable[int]) -> Seeds:
        """Of EDM's notation, a range or any integers."""
        if isinstance(seeds, Seeds):
            return seeds
        if isinstance(seeds, str):
            return cls(_bounded(part) for part in parse_ranges(seeds))
        if isinstance(seeds, range) and seeds.step == 1 and 0 <= seeds.start < seeds.stop <= LIMIT:
            return cls([seeds])
        if not isinstance(seeds, Iterable):
            raise ConfigError(f'seeds must be integers, or text such as "0-49999", got {type(seeds).__name__}')
        return cls(_runs(check_seeds(list(seeds))))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._between(start, stop)[::step] if step > 0 else [self[i] for i in range(start, stop, step)]
        if not -len(self) <= index < len(self):
            raise IndexError(f"seed {index} of {len(self)}")
        index %= len(self)
        part = bisect.bisect_right(self._ends, index)
        return self.ranges[part][index - self._ends[part]]  # counted from the part's end

    def _between(self, start: int, stop: int) -> list[int]:
        found: list[int] = []
        part = bisect.bisect_right(self._ends, start)
        while len(found) < stop - start:
            first = self._ends[part] - len(self.ranges[part])
            found.extend(self.ranges[part][max(start - first, 0) : stop - first])
            part += 1
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seeds) and str(self) == str(other)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in _joined(self.ranges))


def _bounded(part: range) -> range:
    check_seeds([part[0], part[-1]])
    return part


def _runs(seeds: list[int]) -> list[range]:
    """Ranges of what follows each other."""
    starts = [0, *(i for i in range(1, len(seeds)) if seeds[i] != seeds[i - 1] + 1)]
    return [range(seeds[i], seeds[j - 1] + 1) for i, j in zip(starts, [*starts[1:], len(seeds)], strict=True)]


def _joined(ranges: list[range]) -> list[range]:
    """As few ranges as say the same."""
    found: list[range] = []
    for part in ranges:
        if found and found[-1].stop == part.start:
            found[-1] = range(found[-1].start, part.stop)
        else:
            found.append(part)
    return found


def _check_once(ordered: list[range]) -> None:
    """Raise ConfigError where ranges, by their starts, overlap."""
    end, twice = 0, 0
    named: list[int] = []
    for part in ordered:
        again = range(part.start, min(end, part.stop))
        twice += len(again)
        named.extend(again[: SHOWN - len(named)])
        end = max(end, part.stop)
    if twice:
        more = f" and {twice - len(named)} more" if twice > len(named) else ""
        raise ConfigError(
            f"seeds are named twice: {', '.join(map(str, named))}{more}; a sample is its seed, so name each one once"
        )
