"""A diffusers pipeline that owns its loop, so that the predictor chooses each step per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel  # type: ignore[attr-defined]
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from amed_engine.adapters.adapter import keywords
from amed_engine.adapters.autoencoders import decode_latents
from amed_engine.adapters.facts import facts_of
from amed_engine.adapters.latents import time_ids
from amed_engine.adapters.taps import Tap
from amed_engine.errors import ConfigError
from amed_engine.integrations.common import check_start, make_program, open_predictor
from amed_engine.integrations.diffusers.components import check_network, check_trained_for
from amed_engine.integrations.diffusers.conditions import (
    Ask,
    Conditions,
    check_asked,
    check_guidance,
    of_classes,
    of_prompts,
    with_pooled,
)
from amed_engine.integrations.diffusers.means import PromptMeans, mean_of_classes
from amed_engine.integrations.diffusers.predictor import AMEDPredictorModel
from amed_engine.integrations.diffusers.scheduler import for_pipeline
from amed_engine.integrations.diffusers.text import Prompts
from amed_engine.sampling.denoiser import Denoised, Denoiser, as_denoised
from amed_engine.sampling.loop import State, Trajectory, evaluate
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program

OUTPUTS = ("pil", "np", "pt", "latent")


class AMEDPipeline(DiffusionPipeline):
    """Images from a U-Net, or a model called like one, in the predictor's number of evaluations.

    unet: (sample, timestep (B,), class_labels or encoder_hidden_states) -> output; its `mid_block`, if there is one, is the
    bottleneck. scheduler: an AMEDScheduler, or another whose configuration says what the model predicts. predictor: an
    AMEDPredictor with a plan, a path to one, or None: then the scheduler's constants decide. vae: decodes what the loop ends
    with. text_encoder to force_zeros_for_empty_prompt: Stable Diffusion's or SDXL's, for prompts. null_class: the class
    that means none, for guidance. verify: compare the network with the fingerprint in the predictor's plan.

    `AMEDPipeline.from_pipe(pipe, predictor=predictor)` takes the components of a pipeline, such as Stable Diffusion's.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components: ClassVar = ["predictor", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(
        self,
        # By these types `from_pipe` knows which components it may take over.
        unet: UNet2DModel | UNet2DConditionModel | DiTTransformer2DModel,
        scheduler: Any,
        predictor: Any = None,
        vae: AutoencoderKL | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        null_class: int | None = None,
        verify: bool = True,
    ):
        super().__init__()
        if predictor is not None and not isinstance(predictor, AMEDPredictorModel):
            predictor = AMEDPredictorModel.of(open_predictor(predictor))  # type: ignore[arg-type]
        if predictor is not None and predictor.predictor.plan is None:
            raise ConfigError("AMEDPipeline needs a predictor that was saved with its plan")
        check_network(unet, vae)
        scheduler = for_pipeline(scheduler)
        if verify and predictor is not None:
            check_trained_for(predictor.predictor.plan, unet, scheduler, null_class)
        texts = {"text_encoder": text_encoder, "tokenizer": tokenizer}
        texts |= {"text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2}
        self.register_modules(unet=unet, scheduler=scheduler, predictor=predictor, vae=vae, **texts)
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.register_to_config(null_class=null_class, verify=verify)
        self.image_processor = VaeImageProcessor()
        self._interrupt, self._num_timesteps, self._means = False, 0, PromptMeans()

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
        prompt: str | list[str] | None = None,
        batch_size: int | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        prompt, negative_prompt, num_images_per_prompt, prompt_embeds and negative_prompt_embeds (B, L, D), and SDXL's pooled
        ones (B, D): as Stable Diffusion's pipelines take them. class_labels: of a class-conditional model, one or one each.
        guidance_scale: D_u + g (D_c - D_u), where None and 1 are no guidance; a predictor is for the one it was trained with.
        batch_size: how many images, where latents, prompts and class_labels do not say. generator: one, or one per image.
        num_inference_steps: intervals; a predictor has its own number, and another raises. latents: (B, C, H, W) of unit
        variance. output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent" as the loop ends.
        callback_on_step_end: (pipeline, interval, timestep, {"latents": x}) -> {} or {"latents": changed}, after each
        interval; `pipeline._interrupt = True` ends after it. Raises ConfigError.
        """
        _check(output_type, callback_on_step_end_tensor_inputs)
        scale = self._guidance(guidance_scale)
        given = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        texts = None
        if any(text is not None for text in given.values()):
            how = {"num_images_per_prompt": num_images_per_prompt, "do_classifier_free_guidance": scale is not None}
            texts = self.encode_prompt(**given, **how)
        conditions = self._conditions(class_labels, texts, scale)
        latents = self._latents((conditions.rows or 1) if batch_size is None else batch_size, generator, latents)
        told = conditions.expand(len(latents))
        program = self._program(num_inference_steps, latents, conditions)
        check_start(program.mean, latents)
        self._interrupt, self._num_timesteps = False, program.intervals
        with self._tap() as tap:
            denoiser = told.bind(self._tapped(tap))
            names = callback_on_step_end_tensor_inputs
            images = self._loop(program, denoiser, latents * program.sigmas[0], callback_on_step_end, names)
        if self.vae is not None and output_type != "latent":
            images = decode_latents(self.vae, images)
        self.maybe_free_model_hooks()
        pictures: Any = self.image_processor.postprocess(images, output_type)
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        prompt_2: str | list[str] | None = None,
    ) -> tuple[Any, ...]:
        """Embeddings (P·num_images_per_prompt, L, D) of prompts and of what guidance leads away from, "" if not said; of
        SDXL also the pooled ones (P·num_images_per_prompt, D) of both. prompt_2: what its second encoder is told instead.
        """
        given = Prompts(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            prompt_2=prompt_2,
        )
        encoded = given.encode(self, device or self._execution_device, do_classifier_free_guidance)
        return tuple(
            None if rows is None else rows.to(self.unet.dtype).repeat_interleave(num_images_per_prompt, dim=0)
            for rows in encoded
        )

    @property
    def vae_scale_factor(self) -> int:
        """How many times larger images are than their latents."""
        return 8 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def denoiser(self, class_labels: Tensor | None = None, prompt_embeds: Tensor | None = None) -> Denoiser:
        """The model as (x, sigma (B,)) -> D, for any sampler of noise levels."""
        given = {"prompt_embeds": prompt_embeds, "do_classifier_free_guidance": False}
        texts = None if prompt_embeds is None else self.encode_prompt(**given)
        told = self._conditions(class_labels, texts, None)
        return lambda x, sigma: told.expand(len(x)).bind(self._ask)(x, sigma)

    def _ask(self, x: Tensor, sigma: Tensor, told: dict[str, Tensor]) -> Denoised:
        model = self.scheduler.model
        scaled = model.scaled(x, sigma).to(self.unet.dtype)
        lent = {name: value.clone() for name, value in told.items()}  # the network may write to them
        output = self.unet(scaled, model.timestep(sigma), **keywords(None, lent), return_dict=False)[0]
        # Some models estimate variances as well, in as many channels again.
        return Denoised(model.denoised(x, output[:, : x.shape[1]].to(x.dtype), sigma))

    def _tap(self) -> Tap:
        reads = self.predictor is not None and getattr(self.unet, "mid_block", None) is not None
        return Tap(self.unet, "mid_block" if reads else None)

    def _tapped(self, tap: Tap) -> Ask:
        """The model with its bottleneck: of both halves of a guided batch, which part again round it."""
        return lambda x, sigma, told: as_denoised(tap.denoiser(lambda x, sigma: self._ask(x, sigma, told))(x, sigma))

    def _guidance(self, guidance_scale: Any) -> float | None:
        scale = check_guidance(guidance_scale)
        known = self.predictor is not None
        own = (self.predictor.predictor.plan.guidance_scale or 1) if known else self.scheduler.config["guidance_scale"]
        if own is not None and (scale or 1) != own:
            raise ConfigError(
                f"this predictor was trained with guidance_scale={own}, got {guidance_scale}; pass that value, or a predictor "
                "for this one"
            )
        return scale

    def _conditions(self, labels: Any, texts: tuple[Any, ...] | None, scale: float | None) -> Conditions:
        """What the model is told, checked against what it says of itself."""
        facts = facts_of(self.unet)
        check_asked(facts, labels is not None, texts is not None, scale is not None)
        if texts is not None:
            embeds, negative, *pooled = texts
            told = of_prompts(embeds, negative, facts.conditions.get("encoder_hidden_states"), scale)
            return with_pooled(told, time_ids(self, self.unet, pooled[0]), *pooled) if pooled else told
        if labels is None:
            return Conditions({}, {})
        null = facts.null_class if self.config["null_class"] is None else self.config["null_class"]
        told = of_classes(labels, facts.label_dim, null, scale)
        return told.to(self._execution_device)

    def _program(self, steps: int | None, latents: Tensor, conditions: Conditions) -> Program:
        if self.predictor is None:
            self.scheduler.set_timesteps(steps)
            return self.scheduler.program(self.scheduler.levels).on(latents.device, latents.dtype)
        plan = self.predictor.predictor.plan
        if steps not in (None, plan.intervals):
            raise ConfigError(
                f"this predictor was trained for {plan.intervals} steps, got num_inference_steps={steps}; leave it out"
            )
        mean = self._mean(plan, conditions, latents) if plan.afs == "mean" else None
        return make_program(self.predictor.predictor, plan.levels, plan.afs, latents, mean)

    def _mean(self, plan: Plan, conditions: Conditions, latents: Tensor) -> Tensor:
        """What the first step of each image starts about, (1 or B, C, H, W)."""
        if plan.mean is not None and len(plan.mean.rows()) == 1:
            return plan.mean.rows()
        if not conditions.told or "class_labels" in conditions.told:
            return mean_of_classes(plan.mean, conditions)
        return self._means.of(conditions, self._ask, self.unet, plan.sigmas[0], latents)

    def _latents(self, batch: int, generator: Any, latents: Tensor | None) -> Tensor:
        if batch < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch}")
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
        trajectory, state = Trajectory(program, denoiser, program.mean), State(x)
        with self.progress_bar(total=program.intervals) as bar:  # type: ignore[call-arg]
            for i in range(program.intervals):
                state = trajectory.interval(state, i)[-1]
                if callback is not None:
                    timestep = self.scheduler.model.timestep(program.sigmas[i])
                    given = callback(self, i, timestep, dict.fromkeys(names, state.y[0]))
                    state = state.at(given.get("latents", state.y[0]))
                bar.update()
                if self._interrupt:
                    return state.y[0]
        return evaluate(denoiser, state.y, (program.sigmas[-1],))[0].x0 if program.denoise_to_zero else state.y[0]


def _check(output_type: str, names: Sequence[str]) -> None:
    if output_type not in OUTPUTS:
        raise ConfigError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")
    if unknown := sorted(set(names) - set(AMEDPipeline._callback_tensor_inputs)):
        raise ConfigError(f"callback_on_step_end_tensor_inputs may name latents, got {', '.join(unknown)}")
