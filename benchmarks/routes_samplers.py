"""Routes in the shapes of other samplers: k-diffusion, ComfyUI, diffusers, PhysicsNeMo."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from harness import Unavailable
from routes import TRACED, Bench, Draw, Route
from torch import Tensor, nn

from amed_engine.integrations.comfyui.features import ConditionalFeatures
from amed_engine.integrations.k_diffusion import sample_amed
from amed_engine.integrations.physicsnemo import AMEDSolver


def k_diffusion(bench: Bench, stack: ExitStack) -> Draw:
    x = bench.latents * bench.sigmas[0]
    options = {"predictor": bench.predictor, "bottleneck": bench.block, "afs": True, "disable": True}
    return lambda: sample_amed(bench.denoised, x, bench.sigmas, **options)


def comfyui(bench: Bench, stack: ExitStack) -> Draw:
    features = ConditionalFeatures()

    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        x0, h = bench.features(x, sigma)
        features.patch({"h": h, "transformer_options": {"cond_or_uncond": [0], "sigmas": sigma}})
        return x0

    x = bench.latents * bench.sigmas[0]
    options = {"predictor": bench.predictor, "bottleneck": features.take, "afs": True}
    return lambda: sample_amed(model, x, bench.sigmas, extra_args={}, callback=None, disable=True, **options)


@torch.no_grad()
def scheduler(bench: Bench, stack: ExitStack) -> Draw:
    options = {"sigma_data": bench.network.sigma_data}
    scheduler = _diffusers().AMEDScheduler.from_predictor(bench.predictor, options)

    @torch.no_grad()
    def draw() -> Tensor:
        scheduler.set_timesteps()
        x = bench.latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            x = scheduler.step(bench.network.model(scaled, t.expand(bench.batch), bench.labels)[0], t, x).prev_sample
        return x

    return draw


def pipeline(bench: Bench, stack: ExitStack) -> Draw:
    diffusers = _diffusers()
    scheduler = diffusers.AMEDScheduler(sigma_data=bench.network.sigma_data)
    pipe = diffusers.AMEDPipeline(UNet(bench), scheduler, bench.predictor)
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(latents=bench.latents, output_type="latent").images


def physicsnemo(bench: Bench, stack: ExitStack) -> Draw:
    """Through its own `sample` and noise scheduler."""
    if find_spec("physicsnemo") is None:
        raise Unavailable("nvidia-physicsnemo is not installed")
    try:
        from physicsnemo.diffusion.noise_schedulers import EDMNoiseScheduler
        from physicsnemo.diffusion.samplers import sample
    except ImportError as error:
        raise Unavailable(f"nvidia-physicsnemo cannot be imported: {error}") from error
    scheduler, levels = EDMNoiseScheduler(), bench.whole.plan.levels.float()
    denoiser = scheduler.get_denoiser(x0_predictor=bench.denoised, denoising_type="ode")
    solver = AMEDSolver(denoiser, bench.whole, bench.block)

    @torch.no_grad()
    def draw() -> Tensor:
        return sample(denoiser, bench.latents * levels[0], scheduler, 0, solver=solver, time_steps=levels)

    return draw


class UNet(nn.Module):
    """The network F(c_in·x, timestep) as diffusers calls its own."""

    def __init__(self, bench: Bench):
        super().__init__()
        self.config = SimpleNamespace(sample_size=bench.shape[-1], in_channels=bench.shape[0])
        self.mid_block, self.bench = bench.block, bench
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.bench.network.model(sample, timestep, self.bench.labels)[0],)


def _diffusers() -> Any:
    if find_spec("diffusers") is None:
        raise Unavailable("diffusers is not installed")
    import amed_engine.integrations.diffusers as module

    return module


HERE = "amed_engine/integrations"
SAMPLERS = (
    Route(
        "k-diffusion",
        "integrations/k_diffusion.md",
        "nothing",
        (f"{HERE}/k_diffusion.py",),
        "per_sample",
        k_diffusion,
    ),
    Route(
        "ComfyUI, Forge",
        "integrations/comfyui.md",
        "ComfyUI",
        (f"{HERE}/comfyui/*.py",),
        "per_sample",
        comfyui,
    ),
    Route(
        "diffusers pipeline",
        "integrations/diffusers.md",
        "diffusers",
        (f"{HERE}/diffusers/pipeline*.py",),
        "per_sample",
        pipeline,
    ),
    Route(
        "diffusers scheduler",
        "integrations/diffusers.md",
        "diffusers",
        (f"{HERE}/diffusers/scheduler*.py",),
        "constants",
        scheduler,
        TRACED,
    ),
    Route(
        "PhysicsNeMo",
        "integrations/physicsnemo.md",
        "nvidia-physicsnemo",
        (f"{HERE}/physicsnemo.py",),
        "whole_steps",
        physicsnemo,
        TRACED,
    ),
)
