"""A diffusers pipeline that owns its loop, so that the predictor chooses each step per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# ModelMixin by this name, in this module: so diffusers recognises the class when it loads a saved pipeline.
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from amed_engine.denoiser import Denoiser
from amed_engine.errors import ConfigError
from amed_engine.images import to_uint8
from amed_engine.integrations.common import Tap, make_program, open_predictor
from amed_engine.integrations.diffusers.scheduler import AMEDScheduler
from amed_engine.loop import Program, State, Trajectory, evaluate
from amed_engine.plan import Plan
from amed_engine.predictor import AMEDPredictor

OUTPUTS = ("pil", "np", "pt", "latent")


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
    def of(cls, predictor: AMEDPredictor) -> AMEDPredictorModel:
        """A predictor as such a component, with its own copy of the weights."""
        model = cls(**predictor.config, plan=None if predictor.plan is None else predictor.plan.to_json())
        model.predictor.load_state_dict(predictor.state_dict())
        return model.eval()

    def forward(self, features: Tensor | None, sigma: Tensor, sigma_next: Tensor) -> Any:
        return self.predictor(features, sigma, sigma_next)


class AMEDPipeline(DiffusionPipeline):
    """Images from a UNet2DModel, or a model called like one, in the predictor's number of evaluations.

    unet: (sample, timestep (B,), class_labels) -> output; its `mid_block`, if there is one, is the bottleneck. scheduler:
    an AMEDScheduler, or another whose configuration says what the model predicts. predictor: an AMEDPredictor with a
    plan, a path to one, or None: then the scheduler's constants decide.
    """

    model_cpu_offload_seq = "unet"
    _optional_components: ClassVar = ["predictor"]
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(self, unet: Any, scheduler: Any, predictor: Any = None):
        super().__init__()
        if predictor is not None and not isinstance(predictor, AMEDPredictorModel):
            predictor = AMEDPredictorModel.of(open_predictor(predictor))  # type: ignore[arg-type]
        if predictor is not None and predictor.predictor.plan is None:
            raise ConfigError("AMEDPipeline needs a predictor that was saved with its plan")
        if not isinstance(scheduler, AMEDScheduler):
            scheduler = AMEDScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler, predictor=predictor)
        self._interrupt, self._num_timesteps = False, 0

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Intervals of the last call."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        batch_size: how many, unless latents or class_labels say. generator: one, or one per image. num_inference_steps:
        intervals; a predictor has its own number, and another raises. latents: (B, C, H, W) of unit variance.
        output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent" as the loop ends.
        callback_on_step_end: (pipeline, interval, timestep, {"latents": x}) -> {} or {"latents": changed}, after each
        interval; `pipeline._interrupt = True` ends after it. Raises ConfigError.
        """
        _check(output_type, callback_on_step_end_tensor_inputs)
        labels = (
            None if class_labels is None else torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        )
        latents = self._latents(batch_size if labels is None else len(labels), generator, latents)
        program = self._program(num_inference_steps, latents)
        self._interrupt, self._num_timesteps = False, program.intervals
        names = callback_on_step_end_tensor_inputs
        reads = self.predictor is not None and getattr(self.unet, "mid_block", None) is not None
        with Tap(self.unet, "mid_block" if reads else None) as tap:
            denoiser = tap.denoiser(self.denoiser(labels))
            images = self._loop(program, denoiser, latents * program.sigmas[0], callback_on_step_end, names)
        self.maybe_free_model_hooks()
        pictures = _postprocess(images, output_type)
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def denoiser(self, class_labels: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """The model as (x, sigma (B,)) -> D, for any sampler of noise levels."""
        ask, options = self.scheduler.model, {} if class_labels is None else {"class_labels": class_labels}

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            scaled = ask.scaled(x, sigma).to(self.unet.dtype)
            output = self.unet(scaled, ask.timestep(sigma), **options, return_dict=False)[0]
            # Some models estimate variances as well, in as many channels again.
            return ask.denoised(x, output[:, : x.shape[1]].to(x.dtype), sigma)

        return denoise

    def _program(self, steps: int | None, latents: Tensor) -> Program:
        if self.predictor is None:
            self.scheduler.set_timesteps(steps)
            return self.scheduler.program(self.scheduler.levels).on(latents.device, latents.dtype)
        plan = self.predictor.predictor.plan
        if steps not in (None, plan.intervals):
            raise ConfigError(
                f"this predictor was trained for {plan.intervals} steps, got num_inference_steps={steps}; leave it out"
            )
        return make_program(self.predictor.predictor, plan.levels, plan.afs, latents)

    def _latents(self, batch: int, generator: Any, latents: Tensor | None) -> Tensor:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch if latents is None else latents.shape[0], self.unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ConfigError(f"got {len(generator)} generators for {shape[0]} images; pass one, or one per image")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ConfigError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(self._execution_device, torch.promote_types(latents.dtype, torch.float32))

    def _loop(self, program: Program, denoiser: Denoiser, x: Tensor, callback: Any, names: Sequence[str]) -> Tensor:
        trajectory, state = Trajectory(program, denoiser), State.start(x)
        with self.progress_bar(total=program.intervals) as bar:  # type: ignore[call-arg]
            for i in range(program.intervals):
                state = trajectory.interval(state, i)[-1]
                if callback is not None:
                    timestep = self.scheduler.model.timestep(program.sigmas[i])
                    given = callback(self, i, timestep, dict.fromkeys(names, state.y[0]))
                    state = _replaced(state, given.get("latents", state.y[0]))
                bar.update()
                if self._interrupt:
                    return state.y[0]
        return evaluate(denoiser, state.y, (program.sigmas[-1],))[0].x0 if program.denoise_to_zero else state.y[0]


def _replaced(state: State, latents: Tensor) -> State:
    """The state with what a callback made of it."""
    return State(latents if state.y[0] is state.x else state.x, (latents,), state.directions)


def _check(output_type: str, names: Sequence[str]) -> None:
    if output_type not in OUTPUTS:
        raise ConfigError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")
    if unknown := sorted(set(names) - set(AMEDPipeline._callback_tensor_inputs)):
        raise ConfigError(f"callback_on_step_end_tensor_inputs may name latents, got {', '.join(unknown)}")


def _postprocess(images: Tensor, output_type: str) -> Any:
    if output_type == "latent":
        return images
    if output_type == "pil":
        return [Image.fromarray(p[:, :, 0] if p.shape[2] == 1 else p) for p in to_uint8(images)]
    unit = (images / 2 + 0.5).clamp(0, 1)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().float().numpy()
