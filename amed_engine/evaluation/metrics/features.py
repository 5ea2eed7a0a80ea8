"""What images are compared by: extractors, callables images (B, C, H, W) -> features (B, F).

Images are bytes 0 .. 255, or floats in [-1, 1] as samplers give them; x/127.5 - 1 turns the first into the second, and
EDM's rule, clip(127.5 x + 128, 0, 255) cut to an integer, the second into the first. Any callable will do as well.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from amed_engine.engine.images import check_pictures, to_uint8
from amed_engine.errors import ConfigError, require
from amed_engine.evaluation.metrics.classifier import load_classifier


class Extractor(Protocol):
    """images (B, C, H, W), bytes or floats in [-1, 1] -> features (B, F), floats."""

    def __call__(self, images: Tensor, /) -> Tensor: ...


def as_floats(images: Tensor) -> Tensor:
    """Images in [-1, 1]: bytes are mapped, floats left as they are, also where they leave that range."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def as_bytes(images: Tensor) -> Tensor:
    """Images as the bytes a PNG holds; bytes are left as they are. Raises ConfigError unless C is 1 or 3."""
    check_pictures(images.shape[1:])
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2) if images.is_floating_point() else images


class Pixels:
    """The values themselves, (B, C·H·W). For small images; nothing is quantised."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        return as_floats(images.to(self.device)).flatten(1)


class DigitFeatures:
    """(B, 64): what the bundled classifier of 8x8 digits knows before its last layer. Raises ConfigError elsewhere."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.classifier = load_classifier()[0].to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.classifier(as_floats(images.to(self.device)).float())[1]


class Inception:
    """(B, 2048): the pool features of Inception-v3 of 2015-12-05, the network behind every published FID.

    Through torch-fidelity, which fetches the weights on first use. Images become bytes, as if written to a PNG; grey ones
    are repeated to three channels. Against EDM's evaluation: both translate the same TensorFlow graph to PyTorch, with its
    weights, EDM as a TorchScript file that resizes inside, torch-fidelity with TensorFlow 1's bilinear resize to 299
    pixels (no half-pixel shift) and (x - 128) / 128 written out. Features should differ by rounding only, so that
    EDM's reference statistics serve; this was not measured here. Published FIDs take 50,000 samples; fewer are
    biased upwards.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        library = require("torch_fidelity.feature_extractor_inceptionv3", "inception", "features='inception'")
        self.network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pictures = as_bytes(images).to(self.device)
        return self.network(pictures.expand(-1, 3, -1, -1))[0]


EXTRACTORS: dict[str, Any] = {"pixels": Pixels, "digits": DigitFeatures, "inception": Inception}


def extractor(features: str | Extractor, device: torch.device | str = "cpu") -> Extractor:
    """An extractor by name, on a device; a callable is returned as it is. Raises ConfigError."""
    if not isinstance(features, str):
        if not callable(features):
            raise ConfigError(f"features must be a name or a callable, got {type(features).__name__}")
        return features
    if features not in EXTRACTORS:
        raise ConfigError(f"unknown features {features!r}; valid names: {', '.join(EXTRACTORS)}, or pass a callable")
    return EXTRACTORS[features](device)
