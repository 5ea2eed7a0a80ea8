"""AMED for diffusers' pipelines: any AMED-Solver or plugin whose midpoints are constants, as a scheduler."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# By this name, in this module, diffusers recognises the class when it loads a saved pipeline.
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from amed_engine.adapters.discrete import DiscreteSteps
from amed_engine.adapters.schedulers import in_effect
from amed_engine.errors import ConfigError
from amed_engine.integrations.common import open_predictor, without_zero
from amed_engine.integrations.diffusers.components import warn_of_range
from amed_engine.integrations.diffusers.configuration import as_saved, in_full, mean_of_config, of_predictor, solver_of
from amed_engine.integrations.diffusers.output import AMEDSchedulerOutput, check_output
from amed_engine.integrations.diffusers.parameterization import Parameterization, given_back, translated
from amed_engine.integrations.diffusers.start import Start, check_level
from amed_engine.sampling.denoiser import dynamic_thresholding
from amed_engine.sampling.loop import State, advance
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.program import Call, Program
from amed_engine.solvers.schedule import check_sigmas
from amed_engine.solvers.stage import Midpoint, Update


class AMEDScheduler(SchedulerMixin, ConfigMixin):
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
    ):
        self._ends_low = final_sigmas_type == "sigma_min"  # else at 0
        if final_sigmas_type not in ("zero", "sigma_min"):
            raise ConfigError(f"final_sigmas_type must be zero or sigma_min, got {final_sigmas_type!r}")
        if midpoints is not None:
            midpoints = [list(map(float, midpoint)) for midpoint in open_predictor(midpoints)]  # type: ignore[union-attr]
            self.register_to_config(midpoints=midpoints)
        self.model = Parameterization.of(self.config)
        self._mean = mean_of_config(afs, mean)
        self.register_to_config(**self.model.unsaid(self.config))
        self.register_to_config(**in_full(self.config))
        self._use(None, self._steps(None) if noise_levels else self._levels(num_train_timesteps), None)

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
    def init_noise_sigma(self) -> float:
        """What latents of unit variance are multiplied with before the first step."""
        return float(self.levels[0]) * self._stretch

    @property
    def _stretch(self) -> float:
        return 1.0 if self._start is None else self._start.stretch

    @property
    def alphas_cumprod(self) -> Tensor | None:
        """alpha² of each training step, (num_train_timesteps,) float64; None for a model without steps."""
        family = self.model.family
        return family.alphas_cumprod if isinstance(family, DiscreteSteps) else None

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of `timesteps`, as image-to-image does."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Begin a trajectory of so many steps, or on these noise levels, or on those of these timesteps.

        Two evaluations per interval: `timesteps` has 2N - 1 entries (final_sigmas_type "zero") or 2N ("sigma_min"), one
        less with afs. timesteps, sigmas: where the intervals begin, and with "sigma_min" where the last one ends.
        """
        given = [value for value in (num_inference_steps, timesteps, sigmas) if value is not None]
        if len(given) > 1 or not (given or self.config["noise_levels"]):
            raise ConfigError("pass one of num_inference_steps, timesteps and sigmas to set_timesteps")
        if timesteps is not None:
            sigmas = self.model.sigma(torch.as_tensor(timesteps, dtype=torch.float64, device="cpu"))
        told = None if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        levels = check_sigmas(self._steps(num_inference_steps) if told is None else without_zero(told))
        self.num_inference_steps = len(levels) - int(self._ends_low)
        self._use(device, levels, self.program(levels))

    def program(self, levels: Tensor) -> Program:
        """The engine's program of this configuration on these noise levels (N + 1,)."""
        midpoints = self.config["midpoints"] or [[0.5]] * (len(levels) - 1)
        check_level(self._mean, levels)
        mean = None if self._mean is None else self._mean.rows()
        options = {"afs": self.config["afs"], "mean": mean, "denoise_to_zero": not self._ends_low}
        return Program.build(solver_of(self.config), levels, [Midpoint(*midpoint) for midpoint in midpoints], **options)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The network's input c_in·x at this evaluation."""
        index = self._index(timestep)
        return self.model.scaled(self._evaluated(sample, index), self.sigmas[index])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> AMEDSchedulerOutput | tuple[Tensor, Tensor]:
        """From the network's output at `sample` to the next point of evaluation. generator: nothing here is random."""
        if self._program is None:
            raise ConfigError("set_timesteps must be called before step")
        check_output(model_output, sample)
        index = self._index(timestep)
        call = self._evaluations[index]
        # A copy: the anchor of the step is kept, and the pipeline's tensor may be written to.
        y = self._evaluated(sample, index).to(torch.promote_types(sample.dtype, torch.float32), copy=True)
        denoised = self.model.denoised(y, model_output.to(y.dtype), _told(call))
        if self._program.solver.thresholds:
            denoised = dynamic_thresholding(denoised)
        moved = denoised if call.update is None else self._advance(y, denoised, call.update)
        self._step_index = index + 1
        kept = call.update is None or not call.update.new_directions  # D itself, as the result or as a direction
        moved, denoised = moved.to(sample.dtype), denoised.to(sample.dtype, copy=kept)
        return AMEDSchedulerOutput(moved, denoised) if return_dict else (moved, denoised)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x + sigma·noise, with the noise level of each timestep (B,), or of the present step in a pipeline.

        At the start of a pipeline with afs: at the highest level, and as the first latents are: scaled, not shifted yet.
        """
        if self.config["afs"] and self._begin_index == 0 and not self._step_index:
            return (original_samples + noise * float(self.levels[0])) * self._stretch
        if self._begin_index is None:
            indices = [self.index_for_timestep(timestep) for timestep in timesteps]
        else:
            indices = [self._step_index or self._begin_index] * len(timesteps)
        sigma = self.sigmas[indices].to(original_samples.device, original_samples.dtype)
        return original_samples + noise * sigma.reshape(-1, *[1] * (noise.dim() - 1))

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where in `timesteps` this one stands."""
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (timesteps == torch.as_tensor(timestep, dtype=timesteps.dtype, device=timesteps.device)).nonzero()
        if not len(found):
            raise ConfigError(f"timestep {float(timestep):g} is none of scheduler.timesteps; pass one of them")
        return int(found[0])

    def _steps(self, count: int | None) -> Tensor:
        """The noise levels of so many steps."""
        if self.config["noise_levels"] is None:
            return self._levels((count or 0) + int(self._ends_low))
        own = len(self.config["noise_levels"]) - int(self._ends_low)
        if count not in (None, own):
            raise ConfigError(f"these noise levels and midpoints are for {own} steps, got num_inference_steps={count}")
        return torch.tensor(self.config["noise_levels"], dtype=torch.float64, device="cpu")

    def _levels(self, count: int) -> Tensor:
        if count < 2:
            raise ConfigError(f"AMEDScheduler needs at least 2 noise levels, got {count}; ask for more steps")
        told = self.settings
        low, high = self.model.range(told["sigma_min"], told["sigma_max"])
        return self.model.levels(told["sigma_schedule"], count, low, high, told["rho"])

    def _use(self, device: torch.device | str | None, levels: Tensor, program: Program | None) -> None:
        """Stand at the start of these levels. Without a program there is only noise to add."""
        self.levels, self._program = levels, program
        self._start = Start(program) if program is not None and program.afs else None
        first = int(self._start is not None)
        self._evaluations: list[Call] = [] if program is None else list(program.evaluations())[first:]
        told = levels if program is None else torch.stack([_told(call) for call in self._evaluations])
        self.timesteps = self.model.timestep(told).to(device, torch.float32)
        last = levels[-1:] if self._ends_low else levels.new_zeros(1)
        self.sigmas = torch.cat([told, last])  # of the evaluations, on the host, and where it ends
        self._state: State | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _index(self, timestep: float | Tensor) -> int:
        """Where the trajectory stands; it begins at this timestep, or at the index that the pipeline has set."""
        if self._step_index is None:
            index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
            if index and self._program is not None:
                self._evaluations[index:] = self._from(self._program, index)
            self._step_index = index
        return self._step_index

    def _from(self, program: Program, index: int) -> list[Call]:
        """The evaluations of a trajectory that starts here, without a history."""
        interval, inside = divmod(index + int(bool(program.afs)), 2)
        if inside:
            raise ConfigError(
                f"a trajectory can only start where an interval does; got index {index} of {len(self.timesteps)}"
                f"{'; set afs=False: image-to-image has no analytic first step' if program.afs else ''}"
            )
        rest = self.levels[interval:]
        if len(rest) == 1:
            return self._evaluations[index:]
        fixed = program.predictor[interval:]  # type: ignore[index]
        return list(Program.build(program.solver, rest, fixed, denoise_to_zero=program.denoise_to_zero).evaluations())

    def _evaluated(self, sample: Tensor, index: int) -> Tensor:
        """Where this evaluation is, of the pipeline's sample."""
        return sample if self._start is None or index else self._start.shifted(sample)

    def _advance(self, y: Tensor, denoised: Tensor, update: Update) -> Tensor:
        state = self._state
        if state is None:
            state = State(y) if self._start is None or self._step_index else self._start.state_at(y)
        # The pipeline's sample counts: a callback may have changed it.
        self._state = advance(state.at(y), (denoised,), update.to(y.device, y.dtype))
        return self._state.y[0]


def _told(call: Call) -> Tensor:
    """The noise level that the network is told, ()."""
    return call.sigma_net[0].reshape(())
