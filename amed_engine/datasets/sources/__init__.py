"""What `generate_dataset` draws from, alike for samplers, exported loops and pipelines of diffusers."""

from __future__ import annotations

from typing import Any

from amed_engine.datasets.sources.base import Source
from amed_engine.datasets.sources.samplers import SamplerSource
from amed_engine.engine.sampler import Sampler
from amed_engine.errors import ConfigError

__all__ = ["Source", "open_source"]


def open_source(
    source: Any, *, guidance_scale: float | None = None, stored: str | None = None, **options: Any
) -> Source:
    """The source of a data set.

    source: an `amed_engine.Sampler`. stored: "uint8" for pictures in [-1, 1], "float32" or "float16"; None is uint8 for samples
    (1 or 3, H, W), else float32. Raises ConfigError.
    """
    if isinstance(source, Sampler):
        return SamplerSource.open(source, guidance_scale, stored, options)
    raise ConfigError(
        f"a data set is drawn from an amed_engine.Sampler, what amed_engine.load_package returns or a pipeline of diffusers, "
        f"got {type(source).__name__}; for a model pass amed_engine.Sampler(model)"
    )
