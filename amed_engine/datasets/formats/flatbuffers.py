"""Tables of FlatBuffers, read: what an Arrow file says of its record batches, before a library unpacks them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from amed_engine.errors import FileFormatError


class Table(NamedTuple):
    """A table at a place of its bytes. Raises struct.error, or FileFormatError, for places outside them."""

    data: bytes
    at: int

    @classmethod
    def root(cls, data: bytes) -> Table:
        return cls(data, _read("<I", data, 0))

    def place(self, field: int) -> int | None:
        """Where a field stands; None for one that is left out."""
        fields = self.at - _read("<i", self.data, self.at)
        entry = 4 + 2 * field
        if fields < 0 or entry >= _read("<H", self.data, fields):
            return None
        offset = _read("<H", self.data, fields + entry)
        return self.at + offset if offset else None

    def table(self, field: int) -> Table:
        return Table(self.data, self._pointed(field))

    def structs(self, field: int, layout: str) -> Iterator[tuple]:
        """Those of a vector."""
        start = self._pointed(field)
        count, size = _read("<I", self.data, start), struct.calcsize(layout)
        if count * size > len(self.data):
            raise FileFormatError(f"it claims {count} entries, more than it has bytes")
        for i in range(count):
            yield struct.unpack_from(layout, self.data, start + 4 + i * size)

    def _pointed(self, field: int) -> int:
        place = self.place(field)
        if place is None:
            raise FileFormatError(f"a table lacks field {field}")
        return place + _read("<I", self.data, place)


def _read(layout: str, data: bytes, at: int) -> Any:
    if at < 0:  # struct would count from the end
        raise FileFormatError("a table lies outside its bytes")
    return struct.unpack_from(layout, data, at)[0]
