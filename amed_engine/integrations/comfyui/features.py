"""The conditional rows of the bottleneck, wherever ComfyUI puts them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amed_engine.errors import ConfigError

CONDITIONAL = 0  # in transformer_options["cond_or_uncond"]


class ConditionalFeatures:
    """A patch for `ModelPatcher.set_model_middle_block_after_patch`, and the function that `sample_amed` reads.

    ComfyUI runs the conditional and unconditional parts of one evaluation in any order, in one batch or in several,
    as memory allows; "cond_or_uncond" names the parts of a batch. Where several prompts are conditional, their mean
    counts. Parts belong to one evaluation as long as they carry the same "sigmas" tensor.
    """

    def __init__(self) -> None:
        self._sigmas: Any = None
        self._parts: list[Tensor] = []

    def patch(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Look at h ((parts) · B, C, h, w) after the middle block and hand it on unchanged."""
        options = arguments["transformer_options"]
        if options.get("sigmas") is not self._sigmas:
            self._sigmas, self._parts = options.get("sigmas"), []
        flags = options["cond_or_uncond"]
        if max(flags) > 1:
            raise ConfigError(
                "AMED reads the prompt's part of a guided pair, and this guider has three: use CFG Guider"
            )
        parts = arguments["h"].chunk(len(flags))
        self._parts += [part for part, flag in zip(parts, flags, strict=True) if flag == CONDITIONAL]
        return {"h": arguments["h"]}

    def take(self) -> Tensor | None:
        """The features (B, C, h, w) of the evaluation that just ended, kept no longer; None if the model has none."""
        parts, self._parts, self._sigmas = self._parts, [], None
        if len({part.shape for part in parts}) > 1:
            raise ConfigError(
                "prompts for areas of different size have bottlenecks that cannot be averaged: set `none`"
            )
        return sum(parts[1:], parts[0]) / len(parts) if len(parts) > 1 else parts[0] if parts else None
