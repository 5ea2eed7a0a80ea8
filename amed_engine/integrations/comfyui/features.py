"""The conditional rows of the bottleneck, wherever ComfyUI puts them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amed_engine.errors import ConfigError

CONDITIONAL = 0  # in transformer_options["cond_or_uncond"]


class ConditionalFeatures:
    """What a U-Net's middle block gave, heard by a patch of its MODEL, for the sampler that takes it.

    ComfyUI runs the conditional and unconditional parts of one evaluation in any order, in one batch or in several,
    as memory allows; "cond_or_uncond" names the parts of a batch. Where several prompts are conditional, their mean
    counts. Parts belong to one evaluation as long as they carry the same "sigmas" tensor; a prompt that is asked again
    in it, as perturbed attention does, is named by the same of "uuids", and counts as it was first.
    """

    def __init__(self) -> None:
        self._sigmas: Any = None
        self._parts: list[Tensor] = []
        self._prompts: set[Any] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> ConditionalFeatures:
        return self  # ModelPatcher.clone copies its patches deeply, and what they hear is taken here

    def patch(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """For `set_model_middle_block_after_patch`, which some hosts have: look at h, and hand it on unchanged."""
        self._hear(arguments["h"], arguments["transformer_options"])
        return {"h": arguments["h"]}

    def output_patch(self, h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """For `set_model_output_block_patch`, which every ComfyUI has: what the first output block is given, unchanged."""
        if options["block"] == ("output", 0):
            self._hear(h, options)
        return h, skip

    def attach(self, model: Any) -> Any:
        """A clone of the MODEL that is heard: before other patches, which may write to what they are given."""
        model = model.clone()
        model.set_model_output_block_patch(self.output_patch)
        patches = model.model_options["transformer_options"]["patches"]
        patches["output_block_patch"] = [self.output_patch, *patches["output_block_patch"][:-1]]
        return model

    def hears(self, model_options: dict[str, Any]) -> bool:
        """Whether a model that samples with these options is heard."""
        patches = model_options.get("transformer_options", {}).get("patches", {})
        return self.output_patch in patches.get("output_block_patch", [])

    def _hear(self, h: Tensor, options: dict[str, Any]) -> None:
        """h: (parts · B, C, h, w)."""
        if options.get("sigmas") is not self._sigmas:
            self._clear()
            self._sigmas = options.get("sigmas")
        flags = options["cond_or_uncond"]
        if max(flags) > 1:
            raise ConfigError(
                "AMED reads the prompt's part of a guided pair, and this guider has three: use CFG Guider"
            )
        prompts = options.get("uuids") or [object() for _ in flags]
        for part, flag, prompt in zip(h.chunk(len(flags)), flags, prompts, strict=True):
            if flag == CONDITIONAL and prompt not in self._prompts:
                self._prompts.add(prompt)
                self._parts.append(part.clone())  # patches that follow write to h

    def _clear(self) -> None:
        self._sigmas, self._parts, self._prompts = None, [], set()

    def take(self) -> Tensor | None:
        """The features (B, C, h, w) of the evaluation that just ended, kept no longer; None if the model has none."""
        parts = self._parts
        self._clear()
        if len({part.shape for part in parts}) > 1:
            raise ConfigError(
                "prompts for areas of different size have bottlenecks that cannot be averaged: set bottleneck to none"
            )
        return sum(parts[1:], parts[0]) / len(parts) if len(parts) > 1 else parts[0] if parts else None
