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
from amed_engine.datasets.formats.thrift import Reader
from amed_engine.datasets.samples import Samples
from amed_engine.errors import FileFormatError, require
from amed_engine.solvers.files import MAX_BYTES

PLAIN = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
UNCOMPRESSED = 0
MAX_FOOTER = 8 * MAX_BYTES
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
        self._writer.add_key_value_metadata({tables.CHECKSUM: rows.checksum(self.header)})
        self._writer.close()
        self._file.close()

    def _abandon(self) -> None:
        if self._writer is not None:
            self._writer.is_open = False  # nothing more is to be written
        self._file.close()


class ParquetShard(Shard):
    def __init__(self, file: Any, size: int):
        self._file, known = file, file.metadata
        self.header, self.checksum = tables.description(known.metadata), tables.checksum(known.metadata)
        self.bounded(size)
        if known.num_rows != self.header.count or not file.schema_arrow.equals(tables.schema(self.header)):
            raise FileFormatError("its columns or the number of its rows are not those of its description")
        self.rows = Rows.join([tables.rows(batch) for batch in self._batches(4096, tables.ROW)])

    def _batches(self, batch: int, columns: list[str] | None = None) -> Iterator[Any]:
        known = set(self._file.schema_arrow.names)
        named = None if columns is None else [name for name in columns if name in known]
        yield from map(tables.check, self._file.iter_batches(batch, columns=named, use_threads=False))

    def arrays(self, batch: int) -> Iterator[np.ndarray]:
        for found in self._batches(batch):
            yield tables.arrays(found, self.header)


def check_plain(path: Path) -> None:
    """Refuse columns that are compressed, or claim more bytes than the file has: reading them could take any memory.

    The fields are those of parquet.thrift: row groups 4, columns 1, their metadata 3, in it codec 4, bytes 6 and 7.
    Raises FileFormatError, and KeyError for what says none of these.
    """
    size = path.stat().st_size
    footer = Reader(_footer(path, size)).struct()
    columns = [column[3] for group in footer[4] for column in group[1]]
    if any(column[4] != UNCOMPRESSED for column in columns):
        raise FileFormatError("its columns are compressed, which no shard's are")
    if sum(max(column[6], column[7]) for column in columns) > size or min(column[7] for column in columns) < 0:
        raise FileFormatError("its columns claim more bytes than it has")


def _footer(path: Path, size: int) -> bytes:
    """What stands before a Parquet file's last eight bytes, the footer's length and PAR1."""
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        length, magic = int.from_bytes(file.read(4), "little"), file.read()
        if magic != b"PAR1" or length > min(size - 8, MAX_FOOTER):
            raise FileFormatError("it does not end as a Parquet file does")
        file.seek(size - 8 - length)
        return file.read(length)


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Shard]:
    library = require("pyarrow.parquet", "datasets", "the format parquet")
    check_plain(path)
    with library.ParquetFile(path, page_checksum_verification=True, **LIMITS) as file:
        yield ParquetShard(file, path.stat().st_size)


PARQUET = Format("parquet", ".parquet", ParquetWriter, _reader, library=tables.LIBRARY)
