"""How a dataset's shards are written: a file of this package for each format."""

from __future__ import annotations

from amed_engine.datasets.formats.arrow import ARROW
from amed_engine.datasets.formats.format import Format
from amed_engine.datasets.formats.npz import NPZ
from amed_engine.datasets.formats.parquet import PARQUET
from amed_engine.datasets.formats.png import PNG
from amed_engine.datasets.formats.webdataset import WEBDATASET
from amed_engine.datasets.formats.zarr import ZARR

FORMATS: dict[str, Format] = {format.name: format for format in (PNG, NPZ, WEBDATASET, PARQUET, ARROW, ZARR)}

__all__ = ["FORMATS", "Format"]
