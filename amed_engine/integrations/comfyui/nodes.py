"""The nodes: a predictor from a file or from numbers, its noise levels and its sampler; and a solver that needs none.

The denoiser is ComfyUI's: it may move or re-create weights at any time, so nothing is ever captured here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amed_engine.checkpoints import load_predictor
from amed_engine.errors import ConfigError
from amed_engine.integrations.comfyui.constants import DEFAULT_TEXT, constants
from amed_engine.integrations.comfyui.description import PREDICTOR, Node, Socket, v1
from amed_engine.integrations.comfyui.features import ConditionalFeatures
from amed_engine.integrations.comfyui.host import FOLDER, folders, host_levels
from amed_engine.integrations.comfyui.trained import (
    Trained,
    check_middle_block,
    plan_of,
    reads_bottleneck,
    sampler,
    stands_alone,
)
from amed_engine.integrations.comfyui.training_free import AFS, NAMES, SCHEDULES, solver
from amed_engine.sampling.predictors import Predictor
from amed_engine.solvers import solver_names

BOTTLENECKS = ["middle_block", "none"]


def _files() -> list[str]:
    return folders().get_filename_list(FOLDER)


def _path(predictor_name: str) -> Path:
    path = folders().get_full_path(FOLDER, predictor_name)
    if path is None:
        raise ConfigError(
            f"there is no predictor {predictor_name!r} in models/{FOLDER}, nor in the folders of extra_model_paths.yaml; "
            "refresh the list (R) and choose one"
        )
    return Path(path)


def load(predictor_name: str) -> tuple[Predictor]:
    return (load_predictor(_path(predictor_name)),)


def file_of(predictor_name: str) -> str:
    """What is in the file now: a predictor that was fitted anew under the same name is another one."""
    return hashlib.sha256(_path(predictor_name).read_bytes()).hexdigest()


def get_sigmas(predictor: Predictor, model: Any = None, denoise: float = 1.0) -> tuple[Tensor]:
    plan = plan_of(predictor)
    levels = plan.levels[plan.intervals - _steps(predictor, denoise) :]
    levels = torch.cat([levels, levels.new_zeros(int(plan.denoise_to_zero))])
    return (levels.float() if model is None else host_levels(levels, model.get_model_object("model_sampling")),)


def _steps(predictor: Predictor, denoise: float) -> int:
    """How many of a predictor's last steps denoise leaves. Raises ConfigError between two of them."""
    whole = plan_of(predictor).intervals
    steps = round(whole * denoise)
    if not 0 < denoise <= 1 or abs(denoise - steps / whole) > 0.0051 or not steps:  # of two digits
        possible = ", ".join(f"{k / whole:.2g}" for k in range(1, whole + 1))
        raise ConfigError(f"this predictor has {whole} steps, so denoise is one of {possible}; got {denoise:g}")
    if steps < whole and not stands_alone(predictor):
        raise ConfigError(
            f"the steps of this predictor build on those before, got denoise {denoise:g}; set denoise to 1, or use AMED Solver"
        )
    return steps


def get_sampler(model: Any, predictor: Predictor, bottleneck: str = "middle_block") -> tuple[Any, Any]:
    if bottleneck not in BOTTLENECKS:
        raise ConfigError(f"bottleneck must be middle_block or none, got {bottleneck!r}")
    features = None
    if bottleneck == "middle_block" and reads_bottleneck(predictor):
        check_middle_block(model, predictor)
        features = ConditionalFeatures()
        model = features.attach(model)
    recipe = Trained(predictor, features)
    return model, sampler(recipe, recipe.check)


_MODEL = Socket("model", "MODEL", "The model that samples.")
_PREDICTOR = Socket("predictor", PREDICTOR, "From Load AMED Predictor or AMED Constants.")
_SIGMAS = Socket("sigmas", "SIGMAS", "The noise levels; connect them to SamplerCustom or SamplerCustomAdvanced.")
_SAMPLER = Socket("sampler", "SAMPLER", "Connect it to SamplerCustom or SamplerCustomAdvanced.")
_SCHEDULE = Socket("schedule", "COMBO", "How the noise levels lie between those of the model.", SCHEDULES)
_DENOISE = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
_CFG = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1}

NODES = (
    Node(
        "AMEDPredictorLoader",
        "Load AMED Predictor",
        f"A predictor from models/{FOLDER} (.safetensors).",
        (Socket("predictor_name", "COMBO", "A file that amed fit or amed distill wrote.", _files),),
        (Socket("predictor", PREDICTOR, "For AMED Schedule and AMED Sampler."),),
        "load",
        load,
        file_of,
    ),
    Node(
        "AMEDSchedule",
        "AMED Schedule",
        "The noise levels that a predictor was trained for.",
        (
            _PREDICTOR,
            Socket(
                "model", "MODEL", "The model that samples; a flow model (SD3, Flux) has to be connected.", optional=True
            ),
            Socket(
                "denoise",
                "FLOAT",
                "Below 1 the given image is changed only that much: the last of the predictor's steps, such as 0.5 of four.",
                optional=True,
                options=_DENOISE,
            ),
        ),
        (_SIGMAS,),
        "get_sigmas",
        get_sigmas,
    ),
    Node(
        "AMEDSampler",
        "AMED Sampler",
        "The sampler of a predictor, and the model with its middle block heard: connect both.",
        (
            _MODEL,
            _PREDICTOR,
            Socket(
                "bottleneck",
                "COMBO",
                "What the predictor reads of the model, if it reads anything: the middle block of a U-Net, or none, with which "
                "it works as constants.",
                BOTTLENECKS,
            ),
        ),
        (Socket("model", "MODEL", "The model that the sampler is to sample."), _SAMPLER),
        "get_sampler",
        get_sampler,
    ),
    Node(
        "AMEDSolver",
        "AMED Solver",
        "A solver that needs no predictor, on noise levels of the model's range.",
        (
            _MODEL,
            Socket(
                "solver",
                "COMBO",
                "iPNDM and DEIS for few evaluations.",
                NAMES,
                options={"default": "ipndm"},
            ),
            Socket(
                "nfe",
                "INT",
                "How often the model is evaluated; some solvers need two for each step.",
                options={"default": 8, "min": 1, "max": 1000},
            ),
            _SCHEDULE,
            Socket("afs", "COMBO", "Whether the first step is analytic, so that one more step fits into nfe.", AFS),
            Socket(
                "denoise",
                "FLOAT",
                "Below 1 the given image is changed only that much; nfe stays.",
                options=_DENOISE,
            ),
        ),
        (_SAMPLER, _SIGMAS),
        "get_solver",
        solver,
    ),
    Node(
        "AMEDConstants",
        "AMED Constants",
        "A predictor of numbers written here, for the model's range of noise levels.",
        (
            _MODEL,
            Socket(
                "constants",
                "STRING",
                "A line for each step: r, scale_dir and scale_time; the scales are 1 where left out.",
                options={"default": DEFAULT_TEXT, "multiline": True},
            ),
            Socket(
                "solver",
                "COMBO",
                "What takes the numbers: AMED-Solver, or a plugin on another.",
                ["amed", *solver_names("optional")],
            ),
            _SCHEDULE,
            Socket("afs", "COMBO", "Whether the first evaluation is analytic and free.", AFS),
            Socket(
                "cfg", "FLOAT", "The cfg that the numbers are for; the sampler has to be set to the same.", options=_CFG
            ),
        ),
        (Socket("predictor", PREDICTOR, "For AMED Schedule and AMED Sampler."),),
        "get_predictor",
        constants,
    ),
)

NODE_CLASS_MAPPINGS = {node.name: v1(node) for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.name: node.title for node in NODES}
