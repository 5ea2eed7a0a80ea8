"""Models that come with the package, each a folder of weights, configuration and predictors beside this file."""

from __future__ import annotations

from pathlib import Path

from amed_engine.checkpoints import Predictor, load_model, load_predictor
from amed_engine.errors import ConfigError
from amed_engine.networks import EDMPrecond

ROOT = Path(__file__).parent


def names() -> list[str]:
    """The bundled models."""
    return sorted(folder.parent.name for folder in ROOT.glob("*/model.safetensors"))


def load(name: str) -> EDMPrecond:
    """A bundled model, in evaluation mode on the CPU. Raises ConfigError with the valid names."""
    if name not in names():
        raise ConfigError(f"unknown model {name!r}; bundled models: {', '.join(names()) or 'none'}")
    return load_model(ROOT / name)


def predictor_nfes(name: str) -> list[int]:
    """The numbers of evaluations for which a bundled model has a predictor."""
    return sorted(int(file.stem.removeprefix("nfe")) for file in (ROOT / name / "predictors").glob("nfe*.safetensors"))


def bundled_predictor(name: str, nfe: int) -> Predictor | None:
    """The bundled predictor for a model at this NFE, None where there is none."""
    file = ROOT / name / "predictors" / f"nfe{nfe}.safetensors"
    return load_predictor(file) if file.is_file() else None
