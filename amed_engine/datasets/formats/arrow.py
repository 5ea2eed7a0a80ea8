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
from amed_engine.datasets.formats.format import Format
from amed_engine.datasets.formats.shard import Header, Rows, Shard, Writer
from amed_engine.datasets.samples import Samples
from amed_engine.errors import FileFormatError


class ArrowWriter(Writer):
    def __init__(self, path: Path, header: Header):
        super().__init__(header)
        self._library = tables.arrow()
        self._file = path.open("wb")

    def _start(self) -> None:
        columns = tables.schema(self.header)
        self._schema = columns.with_metadata({**columns.metadata, tables.KEY: self.header.text().encode()})
        self._writer = self._library.ipc.new_file(self._file, self._schema)

    def _write(self, samples: Samples) -> None:
        last = self._added == self.header.count
        metadata = {b"checksum": Rows.join(self._rows).checksum(self.header).encode()} if last else None
        self._writer.write_batch(tables.table(samples, self._schema), custom_metadata=metadata)

    def _finish(self, rows: Rows, text: str) -> None:
        self._writer.close()
        self._file.close()

    def abort(self) -> None:
        self._file.close()


class ArrowShard(Shard):
    def __init__(self, file: Any, size: int):
        self._file, said = file, file.schema.metadata or {}
        self.header = Header.parse(said.get(tables.KEY, b""))
        self.bounded(size)
        if not file.schema.equals(tables.schema(self.header)) or not file.num_record_batches:
            raise FileFormatError("its columns are not those of its description")
        self.rows = Rows.join([tables.rows(batch) for batch in self._batches()])
        last = file.get_batch_with_custom_metadata(file.num_record_batches - 1)
        self.checksum = (last.custom_metadata or {}).get(b"checksum", b"").decode()

    def _batches(self) -> Iterator[Any]:
        """They lie in the file, of which no more is read than is looked at."""
        for i in range(self._file.num_record_batches):
            yield tables.check(self._file.get_batch(i))

    def arrays(self, batch: int) -> Iterator[np.ndarray]:
        for found in self._batches():
            for start in range(0, found.num_rows, batch):
                yield tables.arrays(found.slice(start, batch), self.header)


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Shard]:
    pa = tables.arrow()
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        yield ArrowShard(file, path.stat().st_size)


ARROW = Format("arrow", ".arrow", ArrowWriter, _reader, library=tables.LIBRARY)
