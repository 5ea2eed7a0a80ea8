"""What of ComfyUI the nodes call: its folders, its interruption, the noise levels of its models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import require
from amed_engine.integrations.comfyui.flow import INSIDE, Flow, flow_of
from amed_engine.solvers.plan import own_range

FOLDER = "amed"  # in ComfyUI's models folder, and in extra_model_paths.yaml


def folders() -> Any:
    """ComfyUI's folder_paths, with models/amed beside the folders that extra_model_paths.yaml names."""
    paths = require("folder_paths", INSIDE)
    paths.add_model_folder_path(FOLDER, str(Path(paths.models_dir, FOLDER)))
    _, suffixes = paths.folder_names_and_paths[FOLDER]
    suffixes.add(".safetensors")
    return paths


def check_interrupted() -> None:
    """ComfyUI's exception where Cancel was pressed."""
    require("comfy.model_management", INSIDE).throw_exception_if_processing_interrupted()


def noise_range(sampling: Any) -> tuple[float, float]:
    """The lowest and highest sigma of x0 + sigma noise that a model's table knows; inf for a flow model's t = 1."""
    flow = flow_of(sampling)
    ends = torch.tensor([float(sampling.sigma_min), float(sampling.sigma_max)], dtype=torch.float64)
    low, high = (ends if flow is None else flow.sigma(ends)).tolist()
    return low, high if high > 0 else math.inf


def usable_range(sampling: Any) -> tuple[float, float]:
    """Where a schedule for the model starts and ends: its own range, up to sigma 80 for a flow model."""
    low, high = noise_range(sampling)
    return own_range(low, min(high, 80.0) if flow_of(sampling) is not None else high)


def host_levels(levels: Tensor, sampling: Any) -> Tensor:
    """Noise levels (float64) as SIGMAS of this model: float32, times for a flow model."""
    flow: Flow | None = flow_of(sampling)
    return (levels if flow is None else flow.time(levels)).float()
