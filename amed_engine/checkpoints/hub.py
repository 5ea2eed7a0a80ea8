"""Directories as the Hugging Face Hub keeps them: model.safetensors and config.json, local or of a fixed commit."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from amed_engine.adapters import Adapter
from amed_engine.checkpoints.adapted import FOLDER, WRAP_FILE, is_adapter, load_adapter, save_adapter
from amed_engine.checkpoints.files import CONFIG_FILE, WEIGHTS_FILE, read_config
from amed_engine.checkpoints.native import PREDICTORS, load_model, load_predictor, save_model, save_predictor
from amed_engine.errors import ConfigError, FileFormatError, require
from amed_engine.networks import EDMPrecond
from amed_engine.sampling.modules import bare
from amed_engine.sampling.predictors import Predictor

logger = logging.getLogger("amed_engine")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Ours, and those of a network of diffusers in a folder of its own; no pickle among them.
FILES = [WEIGHTS_FILE, CONFIG_FILE, WRAP_FILE, f"{FOLDER}/*.safetensors", f"{FOLDER}/*.json"]


def save_pretrained(item: Predictor | EDMPrecond | Adapter, directory: str | os.PathLike) -> None:
    """Save a predictor, its plan included, a network, or what `wrap` made of one, as a directory of safetensors and JSON.

    The directory can be uploaded to the Hub as it is. Of a wrapped network all is saved that wrap was told or found:
    prediction, betas, range, bottleneck, shape, classes, bound conditions; its fingerprint is checked when it is loaded.
    Raises ConfigError for anything else, a network of another's making among them.
    """
    if Path(directory).suffix == ".safetensors":
        raise ConfigError(f"{directory} names a file; pass a directory, or use save_predictor for one file")
    if isinstance(item, Predictor):
        save_predictor(item, directory)
    elif isinstance(bare(item), EDMPrecond):
        save_model(item, directory)  # type: ignore[arg-type]
    elif isinstance(bare(item), Adapter):
        save_adapter(bare(item), Path(directory))
    else:
        raise ConfigError(
            f"save_pretrained saves a predictor or an EDMPrecond, got {type(item).__name__}; or what wrap returns, without "
            "guidance or thresholding round it"
        )


def from_pretrained(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
) -> Predictor | nn.Module:
    """The predictor, network or wrapped network of a local directory or of a Hub repository ("owner/name"), loaded strictly.

    revision: a branch, tag or commit; it is resolved to a commit once, and both files are of that commit.
    local_files_only: nothing is asked of the network; what is not in the cache is an error.
    cache_dir, token: as huggingface_hub takes them.
    Only safetensors and JSON are read, in no case a pickle. Raises ConfigError where nothing is found or the Hub cannot be
    reached, FileFormatError where the files are not ours.
    """
    if os.path.isdir(source):
        if revision is not None:
            raise ConfigError(f"{source} is a local directory, which has no revision {revision!r}; leave revision out")
        folder = Path(source)
    elif isinstance(source, str) and HUB_ID.fullmatch(source):
        folder = _fetch(source, revision, local_files_only, cache_dir, token)
    else:
        raise ConfigError(f"{str(source)!r} is no directory, and no Hub repository of the form 'owner/name'")
    if is_adapter(folder):
        return load_adapter(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileFormatError(f"{folder} has no {WEIGHTS_FILE}; nothing else is loaded, pickles least of all")
    config = read_config(folder)
    return load_predictor(folder) if config.get("kind") in list(PREDICTORS) else load_model(folder)


def _fetch(repo: str, revision: str | None, offline: bool, cache: Any, token: Any) -> Path:
    """The local folder of one commit of a repository, with our files and no others."""
    hub = require("huggingface_hub", "hub", "a model of the Hub", "pass a local directory")
    try:
        if not offline and not (revision and COMMIT.fullmatch(revision)):
            revision = hub.HfApi(token=token).model_info(repo, revision=revision).sha
            logger.info("%s is commit %s", repo, revision)
        return Path(
            hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=FILES,
                local_files_only=offline,
                cache_dir=cache,
                token=token,
            )
        )
    except Exception as error:  # whatever the Hub's client and its transports raise
        raise ConfigError(
            f"{repo} at revision {revision or 'main'} cannot be had {'from the cache' if offline else 'from the Hub'}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
