"""How a dataset's shards are written: a file of this package for each format."""

from __future__ import annotations

from amed_engine.datasets.formats.format import Format
from amed_engine.datasets.formats.npz import NPZ
from amed_engine.datasets.formats.png import PNG

FORMATS: dict[str, Format] = {format.name: format for format in (PNG, NPZ)}

__all__ = ["FORMATS", "Format"]
