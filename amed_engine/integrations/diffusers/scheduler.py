"""AMED for diffusers' pipelines: any AMED-Solver or plugin whose midpoints are constants, as a scheduler."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config

# By this name, in this module, diffusers recognises the class when it loads a saved pipeline.
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from amed_engine.adapters.discrete import DiscreteSteps
from amed_engine.adapters.schedulers import in_effect
from amed_engine.errors import ConfigError
from amed_engine.integrations.common import open_predictor
from amed_engine.integrations.diffusers.components import warn_of_range
from amed_engine.integrations.diffusers.configuration import (
    as_many_as_betas,
    as_saved,
    in_full,
    mean_of_config,
    of_predictor,
    told_alone,
)
from amed_engine.integrations.diffusers.limits import Limits
from amed_engine.integrations.diffusers.parameterization import Parameterization, given_back, translated
from amed_engine.integrations.diffusers.shifting import check_shifting, shifts
from amed_engine.integrations.diffusers.spacing import check_spacing, trained_levels
from amed_engine.integrations.diffusers.steps import Steps
from amed_engine.solvers.mean import FirstStep


class AMEDScheduler(Steps, SchedulerMixin, ConfigMixin):
    """AMED-Solver, or an AMED-Plugin, with one constant Midpoint per interval (arXiv:2312.00094).

    sigma_min .. final_sigmas_type: as EDMEulerScheduler has them. With N steps "zero" spends N - 1 intervals on N levels
    and one more evaluation whose D is the result; "sigma_min" spends N intervals on N + 1 levels and ends at sigma_min.
    beta_start, beta_end, beta_schedule, trained_betas: as DDIMScheduler has them, for models of discrete steps such as
    Stable Diffusion's, whose own range it is unless one is given; without a beta_schedule the model is EDM's. noise_levels:
    the levels themselves. midpoints: (r, scale_dir, scale_time) per interval; None is r = 1/2. solver, solver_options: of
    `make_solver`, one that takes midpoints. afs: the first evaluation is analytic: the pipeline starts at its result. "mean"
    is about the mean answer of the model, `mean`, the JSON of a `Mean` of one row; latents are shifted by it when they are
    first seen, so in a pipeline, and in what `add_noise` says of its start, they lack that until the first `step`.
    guidance_scale: the classifier-free guidance they are for, to call the pipeline with; a scheduler cannot see it.
    timestep_spacing .. use_beta_sigmas: where the steps stand, in the place of sigma_schedule; rescale_betas_zero_snr;
    thresholding .. clip_sample_range, of D; use_flow_sigmas .. shift_terminal, with prediction_type "flow_prediction": as the
    schedulers of diffusers have them. In `config` stand those that somebody said.

    A trajectory's state lives here between calls: one copy (`copy.deepcopy`) per request. Raises ConfigError.
    """

    _compatibles: ClassVar = ["EDMEulerScheduler"]
    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float | None = 0.002,
        sigma_max: float | None = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str | None = None,
        trained_betas: list[float] | None = None,
        noise_levels: list[float] | None = None,
        midpoints: list | None = None,
        solver: str = "amed",
        solver_options: dict[str, Any] | None = None,
        afs: FirstStep = False,
        guidance_scale: float | None = None,
        mean: dict[str, Any] | None = None,
        timestep_spacing: str | None = None,
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        rescale_betas_zero_snr: bool = False,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        use_flow_sigmas: bool = False,
        shift: float = 1.0,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ):
        self._internal_dict = FrozenDict(told_alone(self.config))  # of the optional settings, those that somebody said
        self._ends_low = final_sigmas_type == "sigma_min"  # else at 0
        if final_sigmas_type not in ("zero", "sigma_min"):
            raise ConfigError(f"final_sigmas_type must be zero or sigma_min, got {final_sigmas_type!r}")
        if midpoints is not None:
            midpoints = [list(map(float, midpoint)) for midpoint in open_predictor(midpoints)]  # type: ignore[union-attr]
            self.register_to_config(midpoints=midpoints)
        self.register_to_config(**as_many_as_betas(self.config))
        self.model = Parameterization.of(self.config)
        self._mean = mean_of_config(afs, mean)
        self.register_to_config(**self.model.unsaid(self.config))
        check_shifting(self.config, flow=self.model.flow)
        self.register_to_config(**in_full(self.config), **(shifts(self.config) if self.model.flow else {}))
        check_spacing(self.settings, self.model)
        self._limits = Limits.of(self.config)
        own = self._steps(None, None) if noise_levels else trained_levels(self.model, self.settings)
        self._use(None, own, None)

    @classmethod
    def from_predictor(cls, predictor: Any, config: Mapping[str, Any] | None = None) -> AMEDScheduler:
        """The scheduler that works as this predictor does without a bottleneck, in the setting it was trained for.

        predictor: with a plan, or a path to one. config: of the pipeline's present scheduler, which says what the model
        predicts; a warning where its noise levels are others. Raises ConfigError.
        """
        predictor = open_predictor(predictor)
        scheduler = cls.from_config(dict(config or {}), **of_predictor(predictor))
        warn_of_range(predictor.plan, scheduler)  # type: ignore[union-attr]
        return scheduler

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **changes: Any) -> Any:
        """As every scheduler has it; another solver in `changes` starts from its own options, and classes made of its
        configuration have their own range again, see `settings`. Raises ConfigError for what it cannot mean the same by.
        """
        if isinstance(config, (str, os.PathLike)):  # diffusers still allows it
            config, changes = cls.load_config(config, return_unused_kwargs=True, **changes)
        told = {} if return_unused_kwargs else changes  # others are given back then
        config = translated(as_saved(config), told, inspect.signature(cls.__init__).parameters)
        if isinstance(config, dict) and changes.get("solver", config.get("solver")) != config.get("solver"):
            config.pop("solver_options", None)
        made: Any = super().from_config(in_effect(config), True, **changes)
        made[0].register_to_config(**given_back(config, changes, made[0]))
        return made if return_unused_kwargs else made[0]

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as it holds here; `config` says by other classes' names what they said themselves."""
        return in_effect(self.config)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    @property
    def alphas_cumprod(self) -> Tensor | None:
        """alpha² of each training step, (num_train_timesteps,) float64; None for a model without steps."""
        family = self.model.family
        return family.alphas_cumprod if isinstance(family, DiscreteSteps) else None

    @property
    def betas(self) -> Tensor | None:
        """beta of each training step, (num_train_timesteps,) float64; None for a model without steps."""
        alphas = self.alphas_cumprod
        return None if alphas is None else 1 - alphas / torch.cat([torch.ones_like(alphas[:1]), alphas[:-1]])


def for_pipeline(scheduler: Any) -> AMEDScheduler:
    """An AMEDScheduler as it is, or of another's configuration, for `AMEDPipeline`. Raises ConfigError for what its own loop
    does not do.
    """
    name, made = type(scheduler).__name__, scheduler
    if not isinstance(scheduler, AMEDScheduler):
        made = AMEDScheduler.from_config({**scheduler.config, "_class_name": name})
    if made.model.flow:
        raise ConfigError(
            f"{name} is of a flow-matching model, AMEDPipeline is for epsilon, v and x0 prediction: sample it with "
            "amed_engine.adapters.wrap_pipeline and Sampler, or put AMEDScheduler into the model's own pipeline"
        )
    if made._limits.any:
        raise ConfigError(
            f"{name} has thresholding or clip_sample set; AMEDPipeline asks for the network's own D: set both to False, or put "
            "AMEDScheduler into another pipeline"
        )
    return made
