"""A Parquet file, a row group for each batch; the description under `amed` in the schema's metadata.

Columns are stored plain and without compression, each page with its sum: pictures are compressed already, and a reader needs no
more memory than the file has bytes.
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
from amed_engine.errors import FileFormatError, require
from amed_engine.solvers.files import MAX_BYTES

PLAIN = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
LIMITS = {"thrift_string_size_limit": 4 * MAX_BYTES, "thrift_container_size_limit": 1_000_000}


class ParquetWriter(Writer):
    def __init__(self, path: Path, header: Header):
        super().__init__(header)
        self._library = require("pyarrow.parquet", "datasets", "the format parquet")
        self._file = path.open("wb")
        self._writer: Any = None

    def _start(self) -> None:
        self._schema = tables.schema(self.header)
        self._writer = self._library.ParquetWriter(self._file, self._schema, **PLAIN)

    def _write(self, samples: Samples) -> None:
        self._writer.write_batch(tables.table(samples, self._schema))

    def _finish(self, rows: Rows, text: str) -> None:
        self._writer.add_key_value_metadata({tables.KEY: text.encode()})
        self._writer.close()
        self._file.close()

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.is_open = False  # nothing more is to be written
        self._file.close()


class ParquetShard(Shard):
    def __init__(self, file: Any, size: int):
        self._file, known = file, file.metadata
        self.header, self.checksum = Header.sealed((known.metadata or {}).get(tables.KEY, b""))
        self.bounded(size)
        if known.num_rows != self.header.count or not file.schema_arrow.equals(tables.schema(self.header)):
            raise FileFormatError("its columns or the number of its rows are not those of its description")
        for group in map(known.row_group, range(known.num_row_groups)):
            self._check(group, size)
        self.rows = Rows.join([tables.rows(batch) for batch in self._batches(1 << 16, tables.ROW)])

    def _check(self, group: Any, size: int) -> None:
        chunks = [group.column(i) for i in range(group.num_columns)]
        if any(chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page for chunk in chunks):
            raise FileFormatError("its columns are compressed, which no shard's are")
        if sum(chunk.total_uncompressed_size for chunk in chunks) > size:
            raise FileFormatError("its columns claim more bytes than it has")

    def _batches(self, batch: int, columns: list[str] | None = None) -> Iterator[Any]:
        known = set(self._file.schema_arrow.names)
        named = None if columns is None else [name for name in columns if name in known]
        yield from map(tables.check, self._file.iter_batches(batch, columns=named, use_threads=False))

    def arrays(self, batch: int) -> Iterator[np.ndarray]:
        for found in self._batches(batch):
            yield tables.arrays(found, self.header)


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Shard]:
    library = require("pyarrow.parquet", "datasets", "the format parquet")
    with library.ParquetFile(path, page_checksum_verification=True, **LIMITS) as file:
        yield ParquetShard(file, path.stat().st_size)


PARQUET = Format("parquet", ".parquet", ParquetWriter, _reader, library=tables.LIBRARY)
