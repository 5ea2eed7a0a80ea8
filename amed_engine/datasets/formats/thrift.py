"""Thrift's compact protocol, read: what the footer of a Parquet file says, without a library that ends the process over it."""

from __future__ import annotations

from typing import Any

from amed_engine.errors import FileFormatError

STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
INTEGERS = (4, 5, 6)


class Reader:
    """Reads one value after another off its bytes. Raises FileFormatError where they are none."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def struct(self) -> dict[int, Any]:
        """Values by the numbers of their fields."""
        found: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) & 15 != STOP:
            number = number + (head >> 4) if head >> 4 else self._integer()
            found[number] = head & 15 == TRUE if head & 15 in (TRUE, FALSE) else self._value(head & 15)
        return found

    def _value(self, kind: int) -> Any:
        if kind == STRUCT:
            return self.struct()
        if kind in INTEGERS:
            return self._integer()
        if kind in (LIST, SET):
            return self._list()
        if kind == MAP:
            return self._map()
        if kind in (BINARY, DOUBLE):
            return self._take(self._varint() if kind == BINARY else 8)
        if kind in (TRUE, FALSE, BYTE):
            return self._byte()
        raise FileFormatError(f"its footer has a value of kind {kind}")

    def _list(self) -> list:
        head = self._byte()
        count = self._varint() if head >> 4 == 15 else head >> 4
        return [self._value(head & 15) for _ in range(self._counted(count))]

    def _map(self) -> list[tuple]:
        count = self._counted(self._varint())
        kinds = self._byte() if count else 0
        return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(count)]

    def _counted(self, count: int) -> int:
        """Each entry takes a byte at least."""
        if count > len(self._data) - self._at:
            raise FileFormatError(f"its footer claims {count} entries, more than it has bytes")
        return count

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value = 0
        for place in range(10):
            byte = self._byte()
            value |= (byte & 127) << 7 * place
            if byte < 128:
                return value
        raise FileFormatError("its footer has a number of more than ten bytes")

    def _byte(self) -> int:
        return self._take(1)[0]

    def _take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) < count:
            raise FileFormatError("its footer ends too early")
        self._at += count
        return found
