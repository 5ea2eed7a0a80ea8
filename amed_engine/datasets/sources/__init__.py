"""What `generate_dataset` draws from, alike for samplers, exported loops and pipelines of diffusers."""

from __future__ import annotations

from typing import Any

from amed_engine.datasets.sources.base import Source
from amed_engine.datasets.sources.packages import PackageSource
from amed_engine.datasets.sources.pipelines import PipelineSource, is_pipeline
from amed_engine.datasets.sources.samplers import SamplerSource
from amed_engine.engine.export.package import Package
from amed_engine.engine.sampler import Sampler
from amed_engine.errors import ConfigError

__all__ = ["Source", "open_source"]


def open_source(
    source: Any, *, guidance_scale: float | None = None, stored: str | None = None, **options: Any
) -> Source:
    """The source of a data set.

    source: an `amed_engine.Sampler`, what `amed_engine.load_package` returns, or a pipeline of diffusers. stored: "uint8" for
    pictures in [-1, 1], "float32" or "float16"; None is uint8 for samples (1 or 3, H, W) that are no latents, else float32.
    options: of a pipeline's calls; prompt, one or a list, of which labels choose by number; output_type "latent" for latents.
    Raises ConfigError.
    """
    if isinstance(source, Sampler):
        return SamplerSource.open(source, guidance_scale, stored, options)
    if isinstance(source, Package):
        return PackageSource.open(source, guidance_scale, stored, options)
    if is_pipeline(source):
        return PipelineSource.open(source, guidance_scale, stored, options)
    raise ConfigError(
        f"a data set is drawn from an amed_engine.Sampler, what amed_engine.load_package returns or a pipeline of diffusers, "
        f"got {type(source).__name__}; for a model pass amed_engine.Sampler(model)"
    )
