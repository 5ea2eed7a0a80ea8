"""A predictor as a component of a pipeline."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config

# By this name, in this module, diffusers recognises the class when it loads a saved pipeline.
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from amed_engine.checkpoints.diffusers_folder import keep_name, load_by, save_by
from amed_engine.errors import ConfigError
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.solvers.plan import Plan


class AMEDPredictorModel(ModelMixin, ConfigMixin):
    """An AMEDPredictor and its plan as a component that diffusers saves and loads."""

    @register_to_config
    def __init__(
        self,
        scale_dir: float = 0.01,
        scale_time: float = 0.0,
        bottleneck: list[int] | tuple[int, int] = (8, 8),
        hidden_dim: int = 128,
        bottleneck_dim: int = 4,
        embedding_dim: int = 8,
        scales: str = "bounded",
        plan: dict[str, Any] | None = None,
    ):
        super().__init__()
        rest = {
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "embedding_dim": embedding_dim,
            "scales": scales,
        }
        self.predictor = AMEDPredictor(scale_dir, scale_time, bottleneck=tuple(bottleneck), **rest)  # type: ignore[arg-type]
        self.predictor.plan = None if plan is None else Plan.from_json(plan)

    @classmethod
    def of(cls, predictor: Any) -> AMEDPredictorModel:
        """An AMEDPredictor as such a component, with its own copy of the weights. Raises ConfigError for another."""
        if not isinstance(predictor, AMEDPredictor):
            kind = type(predictor).__name__
            raise ConfigError(
                f"AMEDPipeline takes an AMEDPredictor, got a {kind}; constants are for its scheduler, "
                "AMEDScheduler.from_predictor(predictor) or AMEDScheduler(midpoints=...), others for amed_engine.Sampler"
            )
        model = cls(**predictor.config, plan=None if predictor.plan is None else predictor.plan.to_json())
        model.predictor.load_state_dict(predictor.state_dict())
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """As diffusers does; plain safetensors name the hashes of weights and configuration, the plan in it."""
        options |= {"is_main_process": is_main_process, "save_function": save_function, "variant": variant}
        save = functools.partial(super().save_pretrained, safe_serialization=safe_serialization, **options)
        others = save_function or variant or options.get("push_to_hub") or options.get("use_flashpack")
        if safe_serialization and is_main_process and not others:
            save_by(save, Path(save_directory))
        else:
            save(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As diffusers does. Raises FileFormatError where weights or configuration are not those that were saved together."""
        folder = Path(str(pretrained_model_name_or_path), options.get("subfolder") or "")
        if not folder.is_dir():
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        options.pop("subfolder", None)
        load = functools.partial(super().from_pretrained, **options)
        return keep_name(load_by(load, folder), folder)

    def forward(self, features: Tensor | None, sigma: Tensor, sigma_next: Tensor) -> Any:
        return self.predictor(features, sigma, sigma_next)
