"""Models by name: those that come with the package, each a folder beside this file, and published ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from amed_engine.checkpoints import load_model, load_predictor
from amed_engine.errors import ConfigError
from amed_engine.sampling.predictors import Predictor
from amed_engine.solvers.files import read_json
from amed_engine.solvers.mean import Mean
from amed_engine.zoo.catalogue import CATALOGUE
from amed_engine.zoo.weights import load_decoder, load_weights

__all__ = ["bundled_mean", "bundled_predictor", "load", "load_decoder", "names", "predictor_nfes", "published"]
ROOT = Path(__file__).parent


def names() -> list[str]:
    """The bundled models."""
    return sorted(folder.parent.name for folder in ROOT.glob("*/model.safetensors"))


def published() -> list[str]:
    """The published models, whose weights are not in the package."""
    return sorted(CATALOGUE)


def load(name: str, weights: str | os.PathLike | None = None) -> nn.Module:
    """A model by name, in evaluation mode on the CPU: a bundled one, or a published one.

    weights: of a published model, its file (as published, or converted) or the folder it is in; None looks into the folder
    that the environment variable AMED_WEIGHTS names.
    Raises ConfigError with the valid names, or with what to fetch; FileFormatError where the file is another model's.
    """
    if name in CATALOGUE:
        return load_weights(name, weights)
    if name not in names():
        raise ConfigError(
            f"unknown model {name!r}; bundled models: {', '.join(names()) or 'none'}; published ones: {', '.join(published())}"
        )
    if weights is not None:
        raise ConfigError(f"{name} is bundled and has its weights; leave weights out")
    return load_model(ROOT / name)


def predictor_nfes(name: str) -> list[int]:
    """The numbers of evaluations for which a bundled model has a predictor."""
    return sorted(int(file.stem.removeprefix("nfe")) for file in (ROOT / name / "predictors").glob("nfe*.safetensors"))


def bundled_mean(name: str) -> Mean | None:
    """The mean answer of a bundled model at its highest noise level, None where it was not measured."""
    file = ROOT / name / "mean.json"
    if not file.is_file():
        return None
    return read_json(file, Mean.from_json, "mean answer", "measure it with amed_engine.measure_mean")


def bundled_predictor(name: str, nfe: int) -> Predictor | None:
    """The bundled predictor for a model at this NFE, None where there is none."""
    file = ROOT / name / "predictors" / f"nfe{nfe}.safetensors"
    return load_predictor(file) if file.is_file() else None


class Bundled(Mapping[int, Predictor]):
    """The bundled predictors of a model by NFE, each read from its file whenever it is asked for."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, nfe: int) -> Predictor:
        if (found := bundled_predictor(self.name, nfe)) is None:
            raise KeyError(nfe)
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(predictor_nfes(self.name))

    def __len__(self) -> int:
        return len(predictor_nfes(self.name))
