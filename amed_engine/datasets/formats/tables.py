"""Samples as a table of pyarrow, the same in Parquet and Arrow files.

seed    int64
name    string, 000042
image   struct {bytes: a PNG file, path: 000042.png}, which Hugging Face's datasets show as a picture
array   in its place for floats, a list of as many as a sample has, in C order; the description says the shape
label   int64, a class; or a list of float32
sha256  string, of the sample's bytes
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from amed_engine.datasets.formats.pictures import decoded, encoded
from amed_engine.datasets.formats.shard import CLASS, Header, Rows
from amed_engine.datasets.samples import Samples
from amed_engine.errors import FileFormatError, require

LIBRARY = "pyarrow"
KEY, CHECKSUM = (
    b"amed",
    b"amed.checksum",
)  # of the description in a schema's metadata; what is known at the end stands elsewhere
ROW = ["seed", "label", "sha256"]


def arrow() -> Any:
    return require(LIBRARY, "datasets", "the formats parquet and arrow")


def schema(header: Header) -> Any:
    """The columns that a shard of this description has; its metadata are the description, and how Hugging Face's datasets take
    the columns, which must be able to lack values there."""
    pa = arrow()
    fields = [("seed", pa.int64()), ("name", pa.string())]
    if header.dtype == "uint8":
        fields.append(("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    else:
        fields.append(("array", _list(header.dtype, header.size // np.dtype(header.dtype).itemsize)))
    if header.labels is not None:
        fields.append(("label", pa.int64() if header.labels == CLASS else _list("float32", int(header.labels))))
    return pa.schema([*fields, ("sha256", pa.string())], {KEY: header.text(), b"huggingface": _features(header)})


def _list(dtype: str, size: int) -> Any:
    pa = arrow()
    return pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), size)


def description(metadata: Any) -> Header:
    """What a schema's metadata say. Raises ValueError."""
    return Header.parse((metadata or {}).get(KEY, b""))


def checksum(metadata: Any) -> str:
    return (metadata or {}).get(CHECKSUM, b"").decode()


def _features(header: Header) -> str:
    """JSON of the columns for datasets.Features."""

    def value(dtype: str) -> dict:
        return {"dtype": dtype, "_type": "Value"}

    def numbers(dtype: str, length: int) -> dict:
        return {"feature": value(dtype), "length": length, "_type": "Sequence"}

    found = {"seed": value("int64"), "name": value("string")}
    if header.dtype == "uint8":
        found["image"] = {"_type": "Image"}
    else:
        found["array"] = numbers(header.dtype, header.size // np.dtype(header.dtype).itemsize)
    if header.labels is not None:
        found["label"] = value("int64") if header.labels == CLASS else numbers("float32", int(header.labels))
    return json.dumps({"info": {"features": {**found, "sha256": value("string")}}})


def table(samples: Samples, columns: Any) -> Any:
    """A record batch with these columns."""
    pa = arrow()
    found = {"seed": samples.seeds, "name": samples.names, "sha256": samples.hashes()}
    if samples.arrays.dtype == np.uint8:
        pictures = pa.array(list(encoded(samples.arrays)), pa.binary())
        paths = pa.array([f"{name}.png" for name in samples.names], pa.string())
        found["image"] = pa.StructArray.from_arrays([pictures, paths], ["bytes", "path"])
    else:
        found["array"] = _flat(samples.arrays, columns.field("array").type)
    if samples.labels is not None:
        vectors = samples.labels.ndim == 2
        found["label"] = _flat(samples.labels, columns.field("label").type) if vectors else samples.labels
    return pa.record_batch([pa.array(found[field.name], field.type) for field in columns], schema=columns)


def _flat(arrays: np.ndarray, kind: Any) -> Any:
    pa = arrow()
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(arrays).reshape(-1)), type=kind)


def rows(batch: Any) -> Rows:
    """Seeds, labels and hashes of a record batch, which has been validated."""
    labels = batch.column("label") if "label" in batch.schema.names else None
    if labels is not None:
        vectors = hasattr(labels.type, "list_size")
        labels = _numbers(labels, labels.type.list_size) if vectors else labels.to_numpy()
    hashes = bytes.fromhex("".join(batch.column("sha256").to_pylist()))
    digests = np.frombuffer(hashes, np.uint8).reshape(-1, 32)
    return Rows(batch.column("seed").to_numpy(), labels, digests)


def _numbers(column: Any, size: int) -> np.ndarray:
    return column.flatten().to_numpy().reshape(-1, size)


def arrays(batch: Any, header: Header) -> np.ndarray:
    """The samples of a record batch. Raises FileFormatError."""
    if header.dtype != "uint8":
        return _numbers(batch.column("array"), batch.column("array").type.list_size).reshape(-1, *header.shape)
    names, column = batch.column("name").to_pylist(), batch.column("image")
    seeds = [f"{seed:06d}" for seed in batch.column("seed").to_pylist()]
    if names != seeds or column.field("path").to_pylist() != [f"{seed}.png" for seed in seeds]:
        raise FileFormatError("its names are not those of its seeds")
    pictures = column.field("bytes")
    return np.stack([decoded(pictures[i].as_py(), header.shape, f"{name}.png") for i, name in enumerate(names)])


def check(batch: Any) -> Any:
    """The record batch: its buffers hold what its lengths say, and nothing is missing. Raises ValueError."""
    batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise FileFormatError("values are missing")
    return batch
