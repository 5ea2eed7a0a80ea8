"""The weights of published models: found on this machine, read safely, checked against what the model is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import amed_engine.adapters as adapters
from amed_engine.checkpoints import latent, load_first_stage, load_model, load_published
from amed_engine.checkpoints.first_stage import folder_beside
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.zoo.catalogue import CATALOGUE, Entry

VARIABLE = "AMED_WEIGHTS"


def find(name: str, weights: str | os.PathLike | None = None) -> Path:
    """The file or directory of a published model: `weights`, or where it has one of its names in AMED_WEIGHTS.

    weights: the file itself, or a directory that is searched instead of AMED_WEIGHTS. Raises ConfigError that says which
    file to fetch, from where, and what it must hold.
    """
    entry = CATALOGUE[name]
    place = weights if weights is not None else os.environ.get(VARIABLE)
    if place and (os.path.isfile(place) or _is_model(Path(place))):
        return Path(place)
    names = [f"{name}.safetensors", name, entry.file, f"{name}{Path(entry.file).suffix}"]
    for candidate in (Path(place) / file for file in names if place):
        if candidate.is_file() or _is_model(candidate):
            return candidate
    where = f"{place} has none of {', '.join(dict.fromkeys(names))}" if place else f"{VARIABLE} is not set"
    raise ConfigError(
        f"{name} has no weights here: {where}; fetch {entry.url} ({entry.form}), put it into a folder as {entry.file}, and set "
        f"{VARIABLE} to that folder or pass weights=; `amed convert` makes it smaller and faster to load"
    )


def _is_model(folder: Path) -> bool:
    """Whether it is the directory of one model, ours or diffusers', and not a folder of several."""
    return any((folder / file).is_file() for file in ("model.safetensors", "diffusion_pytorch_model.safetensors"))


def load_weights(name: str, weights: str | os.PathLike | None = None) -> nn.Module:
    """A published model as a denoiser (x, sigma[, labels]) -> (D, bottleneck), in evaluation mode on the CPU.

    Raises ConfigError where the weights are not there, FileFormatError where they are another model's.
    """
    path = find(name, weights)
    return as_denoiser(_open(path, CATALOGUE[name]), name, path)


def _open(path: Path, entry: Entry) -> nn.Module:
    if path.is_dir() and entry.network == "UNet2DConditionModel":
        return latent.load(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return load_model(path)
    # A bare state dict does not tell these.
    untold = ("image_size", "num_head_channels") if entry.network == "OpenAIUNet" else ()
    return load_published(path, **{key: entry.arguments[key] for key in untold})


def as_denoiser(network: nn.Module, name: str, path: Path, **conditions: Any) -> nn.Module:
    """The network of a published model as a denoiser; conditions: as `adapters.wrap` takes them.

    What it says of itself is compared with what the model is known to be: raises FileFormatError where they differ.
    """
    entry = CATALOGUE[name]
    if type(network).__name__ != entry.network:
        raise FileFormatError(f"{path} holds a {type(network).__name__}, but {name} is a {entry.network}")
    config = getattr(network, "config", None)
    facts: Mapping[str, Any] = config if isinstance(config, Mapping) else vars(network)
    for key, expected in entry.arguments.items():
        if key in facts and _listed(facts[key]) != _listed(expected):
            raise FileFormatError(f"{path} is not {name}: its {key} is {facts[key]}, expected {expected}")
    if entry.prediction == "denoised":
        return network
    known: Mapping[str, Any] = {"shape": entry.shape, "betas": entry.alphas_cumprod(), "verify": False}
    return adapters.wrap(network, entry.prediction, **known, **conditions)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def load_decoder(name: str, weights: str | os.PathLike | None = None) -> nn.Module:
    """The first stage of a latent model, of diffusers, which turns its samples into images: what `amed convert` wrote beside
    the network, or what the published checkpoint holds. Raises ConfigError, FileFormatError.
    """
    path = find(name, weights)
    if not (path.is_dir() or path.suffix == ".safetensors"):
        return load_first_stage(path)
    folder = folder_beside(path)
    if not folder.is_dir():
        raise ConfigError(
            f"{name} draws latents, and their first stage is not at {folder}; `amed convert` of the published checkpoint "
            "writes it there"
        )
    return load_first_stage(folder)
