"""A trajectory that a pipeline walks: where it stands, what the network is given and what comes of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import ConfigError
from amed_engine.integrations.common import without_zero
from amed_engine.integrations.diffusers.configuration import solver_of
from amed_engine.integrations.diffusers.limits import Limits
from amed_engine.integrations.diffusers.output import AMEDSchedulerOutput, check_output
from amed_engine.integrations.diffusers.parameterization import Parameterization
from amed_engine.integrations.diffusers.shifting import check_mu, flow_midpoints, shifted, sigma_of
from amed_engine.integrations.diffusers.spacing import spaced
from amed_engine.integrations.diffusers.start import Start, check_level, evaluations_from
from amed_engine.sampling.denoiser import dynamic_thresholding
from amed_engine.sampling.loop import State, advance
from amed_engine.solvers.mean import Mean
from amed_engine.solvers.program import Call, Program
from amed_engine.solvers.schedule import check_sigmas
from amed_engine.solvers.stage import Midpoint, Update


class Steps:
    """The part of a scheduler that a pipeline calls while it samples; `config` and `settings` are the scheduler's."""

    config: Any
    settings: Mapping[str, Any]
    model: Parameterization
    _limits: Limits
    _mean: Mean | None
    _ends_low: bool  # at sigma_min, else at 0

    @property
    def init_noise_sigma(self) -> float:
        """What latents of unit variance are multiplied with before the first step."""
        return 1.0 if self.model.flow else float(self.levels[0]) * self._stretch

    @property
    def _stretch(self) -> float:
        return 1.0 if self._start is None else self._start.stretch

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
        mu: float | None = None,
    ) -> None:
        """Begin a trajectory of so many steps, or on these noise levels, or on those of these timesteps.

        Two evaluations per interval: `timesteps` has 2N - 1 entries (final_sigmas_type "zero") or 2N ("sigma_min"), one
        less with afs. timesteps, sigmas: where the intervals begin, and with "sigma_min" where the last one ends; a flow's
        sigmas are its times t, which are shifted. mu: the shift, with use_dynamic_shifting.
        """
        given = [value for value in (num_inference_steps, timesteps, sigmas) if value is not None]
        if len(given) > 1 or not (given or self.config["noise_levels"]):
            raise ConfigError("pass one of num_inference_steps, timesteps and sigmas to set_timesteps")
        check_mu(self.config, mu, flow=self.model.flow)
        if timesteps is not None:
            told = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
            levels = sigma_of(told / len(self)) if self.model.flow else self.model.sigma(told)  # type: ignore[arg-type]
        elif sigmas is not None:
            levels = without_zero(torch.as_tensor(sigmas, dtype=torch.float64, device="cpu"))
            levels = sigma_of(shifted(self.config, levels, mu)) if self.model.flow else levels
        else:
            levels = self._steps(num_inference_steps, mu)
        levels = check_sigmas(levels)
        self.num_inference_steps = len(levels) - int(self._ends_low)
        self._use(device, levels, self.program(levels))

    def program(self, levels: Tensor) -> Program:
        """The engine's program of this configuration on these noise levels (N + 1,)."""
        own = flow_midpoints(levels) if self.model.flow else [[0.5]] * (len(levels) - 1)
        midpoints = self.config["midpoints"] or own
        check_level(self._mean, levels)
        mean = None if self._mean is None else self._mean.rows()
        options = {"afs": self.config["afs"], "mean": mean, "denoise_to_zero": not self._ends_low}
        return Program.build(solver_of(self.config), levels, [Midpoint(*midpoint) for midpoint in midpoints], **options)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The network's input c_in·x at this evaluation; a flow's samples are its input."""
        index = self._index(timestep)
        y = self._evaluated(sample, index)
        return y if self.model.flow else self.model.scaled(y, self._told[index])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> AMEDSchedulerOutput | tuple[Tensor, Tensor]:
        """From the network's output at `sample` to the next point of evaluation. generator: nothing here is random."""
        program = self._program or self._every_step()
        check_output(model_output, sample)
        index = self._index(timestep)
        call, sigma = self._evaluations[index], self._told[index]
        y = self._opened(self._evaluated(sample, index), sigma)
        denoised = self._limits(self.model.denoised(y, model_output.to(y.dtype), sigma))
        if program.solver.thresholds:
            denoised = dynamic_thresholding(denoised)
        moved = denoised if call.update is None else self._advance(y, denoised, call.update)
        moved = self.model.closed(moved, self._told[index + 1])
        self._step_index = index + 1
        kept = call.update is None or not call.update.new_directions  # D itself, as the result or as a direction
        moved, denoised = moved.to(sample.dtype), denoised.to(sample.dtype, copy=kept)
        return AMEDSchedulerOutput(moved, denoised) if return_dict else (moved, denoised)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x + sigma·noise, with the noise level of each timestep (B,), or of the present step in a pipeline; of a flow
        (1 - t)·x + t·noise.

        At the start of a pipeline with afs: at the highest level, and as the first latents are: scaled, not shifted yet.
        """
        if self.config["afs"] and self._begin_index == 0 and not self._step_index:
            return (original_samples + noise * float(self.levels[0])) * self._stretch
        if self._begin_index is None:
            indices = [self.index_for_timestep(timestep) for timestep in timesteps]
        else:
            indices = [self._step_index or self._begin_index] * len(timesteps)
        sigma = self.sigmas[indices].to(original_samples.device, original_samples.dtype)
        sigma = sigma.reshape(-1, *[1] * (noise.dim() - 1))
        return (original_samples * (1 - sigma) if self.model.flow else original_samples) + noise * sigma

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` as the pipelines of flow-matching models call it. Raises ConfigError for another model."""
        if not self.model.flow:
            raise ConfigError("scale_noise is of flow-matching models; use add_noise")
        return self.add_noise(sample, noise, timestep)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where in `timesteps` this one stands."""
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (timesteps == torch.as_tensor(timestep, dtype=timesteps.dtype, device=timesteps.device)).nonzero()
        if not len(found):
            raise ConfigError(f"timestep {float(timestep):g} is none of scheduler.timesteps; pass one of them")
        return int(found[0])

    def _steps(self, count: int | None, mu: float | None) -> Tensor:
        """The noise levels of so many steps."""
        if self.config["noise_levels"] is None:
            return spaced(self.model, self.settings, count or 0, mu)
        own = len(self.config["noise_levels"]) - int(self._ends_low)
        if count not in (None, own):
            raise ConfigError(f"these noise levels and midpoints are for {own} steps, got num_inference_steps={count}")
        return torch.tensor(self.config["noise_levels"], dtype=torch.float64, device="cpu")

    def _every_step(self) -> Program:
        """Stand at the start of every training step, as diffusers' schedulers do until set_timesteps is called."""
        midpoints = self.config["midpoints"]
        if self._begin_index is not None or (midpoints and len(midpoints) != len(self.levels) - 1):
            raise ConfigError("set_timesteps must be called before step")
        program = self.program(self.levels)
        self._use(self.timesteps.device, self.levels, program)
        return program

    def _use(self, device: torch.device | str | None, levels: Tensor, program: Program | None) -> None:
        """Stand at the start of these levels. Without a program there is only noise to add."""
        self.levels, self._program = levels, program
        self._start = Start(program) if program is not None and program.afs else None
        first = int(self._start is not None)
        self._evaluations: list[Call] = [] if program is None else list(program.evaluations())[first:]
        told = levels if program is None else torch.stack([call.sigma_net[0].reshape(()) for call in self._evaluations])
        self.timesteps = self.model.timestep(told).to(device, torch.float32)
        last = levels[-1:] if self._ends_low else levels.new_zeros(1)
        # What the network is told at each evaluation, on the host, and where it ends; a flow's sigmas are its times.
        self._told = torch.cat([told, last])
        self.sigmas = self._told / (1 + self._told) if self.model.flow else self._told
        self._state: State | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _index(self, timestep: float | Tensor) -> int:
        """Where the trajectory stands; it begins at this timestep, or at the index that the pipeline has set."""
        if self._step_index is None:
            index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
            if index and self._program is not None:
                self._evaluations[index:] = evaluations_from(self._program, self._evaluations, index, self.levels)
            self._step_index = index
        return self._step_index

    def _evaluated(self, sample: Tensor, index: int) -> Tensor:
        """Where this evaluation is, of the pipeline's sample."""
        return sample if self._start is None or index else self._start.shifted(sample)

    def _opened(self, sample: Tensor, sigma: Tensor) -> Tensor:
        """The state at this evaluation: a copy, since the anchor of the step is kept and a pipeline's tensor may be written to.

        Of a flow the one that `step` left, with what a callback has changed in the sample: rounding the sample would be
        multiplied by sigma.
        """
        if not self.model.flow or self._state is None:
            return self.model.opened(sample, sigma)
        left = self._state.y[0]
        return left + self.model.opened(sample - self.model.closed(left, sigma).to(sample.dtype), sigma)

    def _advance(self, y: Tensor, denoised: Tensor, update: Update) -> Tensor:
        state = self._state
        if state is None:
            state = State(y) if self._start is None or self._step_index else self._start.state_at(y)
        # The pipeline's sample counts: a callback may have changed it.
        self._state = advance(state.at(y), (denoised,), update.to(y.device, y.dtype))
        return self._state.y[0]
