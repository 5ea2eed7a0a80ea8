"""What a scheduler does to D: dynamic thresholding, or clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import dynamic_thresholding


class Limits(NamedTuple):
    """The settings as diffusers' schedulers have them.

    thresholding: clamp(D, -s, s)/s with s the `ratio` quantile of |D| of each sample, at least 1 and at most `largest`. clip: D
    stays in -clip .. clip. None is off.
    """

    ratio: float | None = None
    largest: float = 1.0
    clip: float | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Limits:
        """Raises ConfigError for numbers that are none."""
        ratio, largest = settings.get("dynamic_thresholding_ratio", 0.995), settings.get("sample_max_value", 1.0)
        clip = settings.get("clip_sample_range", 1.0)
        if not 0 <= ratio <= 1 or not largest > 0 or not clip > 0:
            raise ConfigError(
                "need 0 <= dynamic_thresholding_ratio <= 1, sample_max_value > 0 and clip_sample_range > 0, got "
                f"{ratio!r}, {largest!r} and {clip!r}"
            )
        on = settings.get("thresholding"), settings.get("clip_sample")
        return cls(ratio if on[0] else None, float(largest), float(clip) if on[1] else None)

    @property
    def any(self) -> bool:
        return self.ratio is not None or self.clip is not None

    def __call__(self, denoised: Tensor) -> Tensor:
        """D within the limits, in memory of its own where there are any; thresholding comes first, as in diffusers."""
        if self.ratio is not None:
            return dynamic_thresholding(denoised, self.ratio, ceiling=self.largest)
        return denoised if self.clip is None else denoised.clamp(-self.clip, self.clip)
