"""Three nodes: load a predictor, its noise levels, and the sampler with the model it watches.

The denoiser is ComfyUI's: it may move or re-create weights at any time, so nothing is ever captured here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from amed_engine.checkpoints import load_predictor
from amed_engine.errors import ConfigError, require
from amed_engine.integrations.comfyui.features import ConditionalFeatures
from amed_engine.integrations.comfyui.flow import sample_amed_flow, to_flow
from amed_engine.integrations.common import one_mean
from amed_engine.integrations.k_diffusion import sample_amed
from amed_engine.sampling.predictors import Predictor
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.solvers.plan import Plan

FOLDER = "amed"  # in ComfyUI's models folder
_INSIDE = "the nodes run inside ComfyUI; put them into its custom_nodes folder"


def plan_of(predictor: AMEDPredictor) -> Plan:
    if predictor.plan is None:
        raise ConfigError("this predictor does not say which noise levels it is for; save it with its plan")
    return predictor.plan


def options_of(predictor: AMEDPredictor) -> dict[str, Any]:
    """What `sample_amed` is told of a predictor. Raises ConfigError for one that starts where each class has its own mean."""
    plan = plan_of(predictor)
    mean = one_mean(plan)
    return {"predictor": predictor, "afs": plan.afs, "mean": None if mean is None else mean.rows()}


class AMEDPredictorLoader:
    """A predictor from models/amed (.safetensors)."""

    RETURN_TYPES: ClassVar = ("AMED_PREDICTOR",)
    FUNCTION: ClassVar = "load"
    CATEGORY: ClassVar = "sampling/custom_sampling/AMED"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"predictor_name": (_folders().get_filename_list(FOLDER),)}}

    def load(self, predictor_name: str) -> tuple[Predictor]:
        path = _folders().get_full_path(FOLDER, predictor_name)
        if path is None:
            raise ConfigError(f"there is no predictor {predictor_name!r} in models/{FOLDER}; refresh the list")
        return (load_predictor(path),)


class AMEDSchedule:
    """The noise levels that a predictor was trained for, for SamplerCustom. A flow model (SD3, Flux) has to be connected."""

    RETURN_TYPES: ClassVar = ("SIGMAS",)
    FUNCTION: ClassVar = "get_sigmas"
    CATEGORY: ClassVar = "sampling/custom_sampling/AMED"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"predictor": ("AMED_PREDICTOR",)}, "optional": {"model": ("MODEL",)}}

    def get_sigmas(self, predictor: AMEDPredictor, model: Any = None) -> tuple[Tensor]:
        levels = plan_of(predictor).levels
        return ((to_flow(levels) if model is not None and _is_flow(model) else levels).float(),)


class AMEDSampler:
    """The sampler of a predictor, and the model with its bottleneck watched: use both. `none` is for models without one."""

    RETURN_TYPES: ClassVar = ("MODEL", "SAMPLER")
    FUNCTION: ClassVar = "get_sampler"
    CATEGORY: ClassVar = "sampling/custom_sampling/AMED"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        choices = (["middle_block", "none"],)
        return {"required": {"model": ("MODEL",), "predictor": ("AMED_PREDICTOR",), "bottleneck": choices}}

    def get_sampler(self, model: Any, predictor: AMEDPredictor, bottleneck: str = "middle_block") -> tuple[Any, Any]:
        if bottleneck not in ("middle_block", "none"):
            raise ConfigError(f"bottleneck must be middle_block or none, got {bottleneck!r}")
        options = options_of(predictor)
        if bottleneck == "middle_block":
            features, model = ConditionalFeatures(), model.clone()
            model.set_model_middle_block_after_patch(features.patch)
            options["bottleneck"] = features.take
        return model, _sampler(plan_of(predictor), sample_amed_flow if _is_flow(model) else sample_amed, options)


def _is_flow(model: Any) -> bool:
    """Whether the state is (1 - t) x0 + t noise. Raises ConfigError for models that start from anything but noise."""
    const = require("comfy.model_sampling", _INSIDE).CONST
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, const):
        return False
    if type(sampling).noise_scaling is not const.noise_scaling:
        raise ConfigError(
            f"this model does not start from noise ({type(sampling).__mro__[1].__name__}): no AMED for it"
        )
    return True


def _sampler(plan: Plan, function: Callable[..., Tensor], options: dict[str, Any]) -> Any:
    """ComfyUI's sampler object for a function."""

    class Sampler(require("comfy.samplers", _INSIDE).KSAMPLER):
        def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
            # Elsewhere the latents of the highest level have variance 1 + sigma²; predictors were trained from sigma².
            return False

        def sample(self, model_wrap: Any, *arguments: Any, **named: Any) -> Tensor:
            wanted, given = plan.guidance_scale or 1.0, getattr(model_wrap, "cfg", None)
            if given is not None and not math.isclose(given, wanted, rel_tol=1e-4):
                raise ConfigError(f"this predictor was trained with cfg {wanted:g}, got {given:g}; set cfg to that")
            return super().sample(model_wrap, *arguments, **named)

    return Sampler(function, extra_options=options)


def _folders() -> Any:
    """ComfyUI's folder_paths, with models/amed among its folders."""
    folders = require("folder_paths", _INSIDE)
    if FOLDER not in folders.folder_names_and_paths:
        folders.folder_names_and_paths[FOLDER] = ([str(Path(folders.models_dir, FOLDER))], {".safetensors"})
    return folders


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (AMEDPredictorLoader, AMEDSchedule, AMEDSampler)}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AMEDPredictorLoader": "Load AMED Predictor",
    "AMEDSchedule": "AMED Schedule",
    "AMEDSampler": "AMED Sampler",
}
