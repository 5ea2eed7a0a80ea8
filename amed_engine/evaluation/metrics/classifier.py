"""A small classifier of 8x8 digits: whether a conditional model draws the class it was asked for, and features of digits.

Its weights come with the package; `python -m amed_engine.metrics.train_classifier` makes them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from amed_engine.checkpoints import read, write
from amed_engine.checkpoints.native import check_tensors
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.sampling.modes import plain_defaults

FILE = Path(__file__).with_name("digit_classifier.safetensors")
KIND = "digit_classifier"
MAX_BYTES = 1 << 20
SHAPE = (1, 8, 8)
FEATURES = 64


class DigitClassifier(nn.Module):
    """Three 3x3 convolutions (16, 32, 32 channels; the later ones halve the resolution) and two linear layers.

    forward(images (B, 1, 8, 8) in [-1, 1]) -> (logits (B, 10), features (B, 64)), the features before the last layer.
    Raises ConfigError for another shape.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(128, FEATURES), nn.SiLU()),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(images.shape[1:]) != SHAPE:
            raise ConfigError(
                f"the digit classifier takes images (B, 1, 8, 8), got {tuple(images.shape)}; use features='pixels', "
                "'inception', or an extractor of your own"
            )
        features = self.body(images)
        return self.head(features), features


def save_classifier(classifier: DigitClassifier, path: str | os.PathLike, report: dict) -> None:
    """Save weights and how they came about, to one .safetensors file."""
    write(path, classifier.state_dict(), {"kind": KIND, "training": report})


def load_classifier(path: str | os.PathLike = FILE) -> tuple[DigitClassifier, dict]:
    """The bundled classifier, or one of `save_classifier`, in evaluation mode, and its training report.

    Raises FileFormatError.
    """
    config, tensors = read(path, MAX_BYTES)
    if config.get("kind") != KIND or not isinstance(config.get("training"), dict):
        raise FileFormatError(f"{path} holds {config.get('kind')!r}, expected {KIND!r} with its training report")
    with plain_defaults(), torch.random.fork_rng(devices=[]):  # initial weights are drawn, only to be overwritten
        classifier = DigitClassifier()
    check_tensors(classifier, tensors, path)
    classifier.load_state_dict(tensors)
    return classifier.eval().requires_grad_(False), config["training"]


@torch.no_grad()
def class_accuracy(images: Tensor, labels: Tensor, classifier: DigitClassifier | None = None) -> float:
    """The part of the images (B, 1, 8, 8) in [-1, 1] that are recognised as the digits (B,) they were drawn for.

    classifier: the bundled one unless given; what it gets wrong on real digits is the ceiling of this number.
    Raises ConfigError.
    """
    known = isinstance(labels, Tensor)
    if not known or labels.shape != images.shape[:1] or labels.is_floating_point() or not len(labels):
        got = f"{labels.dtype} {tuple(labels.shape)}" if known else type(labels).__name__
        raise ConfigError(f"labels must be one class number per image ({len(images)},), got {got}")
    classifier = load_classifier()[0].to(images.device) if classifier is None else classifier
    logits, _ = classifier(images.float())
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()
