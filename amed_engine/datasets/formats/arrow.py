"""An Arrow file (IPC), a record batch for each batch; the description under `amed` in the schema's metadata.

The checksum, which is known at the end, is metadata of the last record batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from amed_engine.datasets.formats import tables
from amed_engine.datasets.formats.flatbuffers import Table
from amed_engine.datasets.formats.format import Format
from amed_engine.datasets.formats.shard import Header, Rows, Shard, Writer
from amed_engine.datasets.samples import Samples
from amed_engine.errors import FileFormatError
from amed_engine.solvers.files import MAX_BYTES

MAGIC = b"ARROW1"
MAX_FOOTER = 8 * MAX_BYTES


class ArrowWriter(Writer):
    def __init__(self, path: Path, header: Header):
        super().__init__(header)
        self._library = tables.arrow()
        self._file = path.open("wb")

    def _start(self) -> None:
        self._schema = tables.schema(self.header)
        self._writer = self._library.ipc.new_file(self._file, self._schema)

    def _write(self, samples: Samples) -> None:
        last = self._added == self.header.count
        metadata = {tables.CHECKSUM: Rows.join(self._rows).checksum(self.header).encode()} if last else None
        self._writer.write_batch(tables.table(samples, self._schema), custom_metadata=metadata)

    def _finish(self, rows: Rows, text: str) -> None:
        self._writer.close()
        self._file.close()

    def _abandon(self) -> None:
        self._file.close()


class ArrowShard(Shard):
    def __init__(self, file: Any, size: int):
        self._file, self.header = file, tables.description(file.schema.metadata)
        self.bounded(size)
        if not file.schema.equals(tables.schema(self.header)) or not file.num_record_batches:
            raise FileFormatError("its columns are not those of its description")
        self.rows = Rows.join([tables.rows(batch) for batch in self._batches()])
        last = file.get_batch_with_custom_metadata(file.num_record_batches - 1)
        self.checksum = tables.checksum(last.custom_metadata)

    def _batches(self) -> Iterator[Any]:
        """They lie in the file, of which no more is read than is looked at."""
        for i in range(self._file.num_record_batches):
            yield tables.check(self._file.get_batch(i))

    def arrays(self, batch: int) -> Iterator[np.ndarray]:
        for found in self._batches():
            for start in range(0, found.num_rows, batch):
                yield tables.arrays(found.slice(start, batch), self.header)


def check_plain(path: Path) -> None:
    """Refuse record batches that are compressed, or lie outside the file: reading them could take any memory.

    By the tables of File.fbs and Message.fbs: footer field 3, the blocks; message field 2, the record batch; in it field 3,
    its compression. Raises FileFormatError, and struct.error for what is none of these.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 10))
        length, magic = int.from_bytes(file.read(4), "little"), file.read()
        if magic != MAGIC or length > min(size - 10, MAX_FOOTER):
            raise FileFormatError("it does not end as an Arrow file does")
        file.seek(size - 10 - length)
        footer = Table.root(file.read(length))
        for offset, metadata, body in footer.structs(3, "<qi4xq"):
            if min(offset, metadata, body) < 0 or offset + metadata + body > size:
                raise FileFormatError("a record batch claims more bytes than it has")
            file.seek(offset + 8)  # the mark of a message, and its length
            batch = Table.root(file.read(metadata)).table(2)
            if batch.place(3):
                raise FileFormatError("its record batches are compressed, which no shard's are")


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Shard]:
    pa = tables.arrow()
    check_plain(path)
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        yield ArrowShard(file, path.stat().st_size)


ARROW = Format("arrow", ".arrow", ArrowWriter, _reader, library=tables.LIBRARY)
