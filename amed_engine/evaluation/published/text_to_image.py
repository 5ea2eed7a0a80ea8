"""Stable Diffusion in parts: prompts become the rows of a table that a captured loop reads, latents become images.

The parts are those of a pipeline's directory of diffusers: unet, vae, text_encoder, tokenizer. Only safetensors are read.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import amed_engine.adapters as adapters
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import latent, load_first_stage
from amed_engine.engine.identity import hashed
from amed_engine.errors import ConfigError, FileFormatError, require
from amed_engine.zoo.catalogue import CATALOGUE
from amed_engine.zoo.weights import VARIABLE, as_denoiser

PARTS = ("unet", "vae", "text_encoder", "tokenizer")
TABLE = "table_encoder_hidden_states"
COLUMNS = ("caption", "text", "prompt")


class TextToImage:
    """A published text-to-image model whose denoiser has room for `rows` prompts, chosen by class labels 0 .. rows - 1.

    denoiser: what a Sampler takes. decoder: its first stage. weights: a pipeline's directory of diffusers, or the folder in
    which it has the model's name; None looks into AMED_WEIGHTS. Raises ConfigError, FileFormatError.
    """

    def __init__(self, name: str, rows: int, weights: str | os.PathLike | None = None):
        folder = find_pipeline(name, weights)
        self.decoder = load_first_stage(folder / "vae")
        self._tokenizer, self._encoder = _text_parts(folder)
        network, null = latent.load(folder / "unet"), self.encode([""])
        texts, none = {"encoder_hidden_states": null.expand(rows, -1, -1)}, {"encoder_hidden_states": null}
        self.denoiser = as_denoiser(network, name, folder / "unet", conditions=texts, null_conditions=none)

    @property
    def fingerprint(self) -> str:
        """Of what makes a prompt's condition: the encoder's weights, the tokenizer's words."""
        return hashed([fingerprint(self._encoder), self._tokenizer.get_vocab()])

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(P, length, width); a prompt that is too long is cut."""
        return adapters.encode_texts(self._tokenizer, self._encoder, list(prompts), self._encoder.device)

    def bind(self, prompts: Sequence[str]) -> None:
        """Make these the prompts of the labels 0, 1, ... In place: a graph that was captured reads the new ones."""
        table = getattr(self.denoiser.conditions, TABLE)
        if not 0 < len(prompts) < len(table):
            raise ConfigError(f"there is room for {len(table) - 1} prompts, got {len(prompts)}")
        self._encoder.to(table.device)
        table[: len(prompts)].copy_(self.encode(prompts))


def find_pipeline(name: str, weights: str | os.PathLike | None = None) -> Path:
    """The directory with the parts of a text-to-image model. Raises ConfigError that says how to get one."""
    place = weights if weights is not None else os.environ.get(VARIABLE)
    for folder in (Path(place), Path(place) / name) if place else ():
        if all((folder / part).is_dir() for part in PARTS):
            return folder
    where = f"neither {place} nor {name} in it has" if place else f"{VARIABLE} is not set to a folder with"
    raise ConfigError(
        f"{name} from prompts needs a pipeline's directory of diffusers: {where} {', '.join(PARTS)}; "
        f"fetch the repository of {CATALOGUE[name].url} in safetensors, or save_pretrained a pipeline"
    )


def _text_parts(folder: Path) -> tuple[Any, Any]:
    """(tokenizer, encoder)"""
    transformers = require("transformers", "diffusers", "a prompt")
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        options = {"local_files_only": True, "use_safetensors": True}
        encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", **options)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{folder} holds no text encoder: {str(error)[:300]}") from error
    return tokenizer, encoder.eval()


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a .csv file, its column caption (or text, or prompt), or of a text file, a line each.

    Raises FileFormatError where there are none.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines(keepends=True)
        prompts = _column(lines, path) if Path(path).suffix == ".csv" else [line.strip() for line in lines]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"{path} is no file of prompts: {error}") from error
    if not prompts or not all(prompts):
        raise FileFormatError(f"{path} has {'an empty line for a prompt' if prompts else 'no prompts'}")
    return prompts


def _column(lines: list[str], path: str | os.PathLike) -> list[str]:
    rows = csv.DictReader(lines)
    names = list(rows.fieldnames or ())
    name = next((name for name in COLUMNS if name in names), None)
    if name is None:
        raise FileFormatError(f"{path} has the columns {', '.join(names)}; prompts are in one of {', '.join(COLUMNS)}")
    return [(row[name] or "").strip() for row in rows]
