"""The same latents through each integration and through `Sampler.run`: largest difference, and time next to it.

pytest benchmarks/bench_integrations.py --benchmark-only
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Contestant, Unavailable, compete
from torch import Tensor, nn
from workloads import WORKLOADS

from amed_engine import AMEDPredictor, Sampler, make_plan
from amed_engine.integrations.comfyui.features import ConditionalFeatures
from amed_engine.integrations.k_diffusion import sample_amed
from amed_engine.integrations.physicsnemo import AMEDSolver
from amed_engine.integrations.serving.triton import TritonPythonModel

BATCH, CLASS, CPU = 8, 3, torch.device("cpu")
Setup = Callable[[], Callable[[], Tensor]]


class Bench:
    """The bundled network with one class bound, a predictor with random weights, and latents."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = WORKLOADS["digits"].build()
        self.block = self.network.get_submodule("model.enc." + list(self.network.model.enc)[-1])
        self.labels = torch.nn.functional.one_hot(torch.tensor([CLASS] * BATCH), 10).float()
        self.predictor = AMEDPredictor(0.1, 0.05, bottleneck=(4, 4)).requires_grad_(False)
        self.predictor.plan = make_plan(5, solver="amed")
        self.latents = torch.randn(BATCH, 1, 8, 8)
        self.sigmas = self.predictor.plan.levels.float()

    def features(self, x: Tensor, sigma: Tensor) -> Any:
        return self.network(x, sigma, self.labels)

    def denoised(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        return self.features(x, sigma).x0

    def engine(self, model: Any, predictor: AMEDPredictor) -> Setup:
        def setup() -> Callable[[], Tensor]:
            sampler = Sampler(model, predictor, shape=(1, 8, 8), backend="eager")
            return lambda: sampler.run(self.latents).images

        return setup

    def k_diffusion(self) -> Callable[[], Tensor]:
        x = self.latents * self.sigmas[0]
        options = {"predictor": self.predictor, "bottleneck": self.block, "afs": True, "disable": True}
        return lambda: sample_amed(self.denoised, x, self.sigmas, **options)

    def comfyui(self) -> Callable[[], Tensor]:
        features = ConditionalFeatures()

        def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            x0, h = self.features(x, sigma)
            features.patch({"h": h, "transformer_options": {"cond_or_uncond": [0], "sigmas": sigma}})
            return x0

        x = self.latents * self.sigmas[0]
        options = {"predictor": self.predictor, "bottleneck": features.take, "afs": True}
        return lambda: sample_amed(model, x, self.sigmas, extra_args={}, callback=None, disable=True, **options)

    @torch.no_grad()
    def scheduler(self) -> Callable[[], Tensor]:
        diffusers = _diffusers()
        scheduler = diffusers.AMEDScheduler.from_predictor(self.predictor, {"sigma_data": self.network.sigma_data})

        @torch.no_grad()
        def draw() -> Tensor:
            scheduler.set_timesteps()
            x = self.latents * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t)
                x = scheduler.step(self.network.model(scaled, t.expand(BATCH), self.labels)[0], t, x).prev_sample
            return x

        return draw

    def pipeline(self) -> Callable[[], Tensor]:
        diffusers = _diffusers()
        pipe = diffusers.AMEDPipeline(
            UNet(self), diffusers.AMEDScheduler(sigma_data=self.network.sigma_data), self.predictor
        )
        pipe.set_progress_bar_config(disable=True)
        return lambda: pipe(latents=self.latents, output_type="latent").images

    def physicsnemo(self, predictor: AMEDPredictor) -> Callable[[], Tensor]:
        def right_hand_side(x: Tensor, t: Tensor) -> Tensor:
            return (x - self.denoised(x, t)) / t.reshape(-1, 1, 1, 1)

        solver = AMEDSolver(right_hand_side, predictor, self.block)
        levels = predictor.plan.levels.float()

        @torch.no_grad()
        def draw() -> Tensor:
            x = self.latents * levels[0]
            for k in range(len(levels) - 1):
                x = solver.step(x, levels[k].expand(BATCH), levels[k + 1].expand(BATCH))
            return x

        return draw


class UNet(nn.Module):
    """The network F(c_in·x, timestep) as diffusers calls its own."""

    def __init__(self, bench: Bench):
        super().__init__()
        self.config = SimpleNamespace(sample_size=8, in_channels=1)
        self.mid_block, self.bench = bench.block, bench
        self.dtype, self.device = torch.float32, CPU

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.bench.network.model(sample, timestep, self.bench.labels)[0],)


def _diffusers() -> Any:
    if importlib.util.find_spec("diffusers") is None:
        raise Unavailable("diffusers is not installed")
    import amed_engine.integrations.diffusers as module

    return module


def triton() -> Callable[[], Tensor]:
    """One request of eight seeds through the model of the Python backend."""
    utils = SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: request[name],
        Tensor=lambda name, array: array,
        InferenceResponse=lambda output_tensors: output_tensors,
    )
    sys.modules["triton_python_backend_utils"] = utils  # type: ignore[assignment]
    options = json.dumps({"model": "digits", "nfe": 5, "backend": "eager"})
    config = json.dumps({"parameters": {"sampler": {"string_value": options}}})
    model = TritonPythonModel()
    model.initialize({"model_config": config, "model_instance_kind": "CPU", "model_instance_device_id": "0"})
    columns = {"SEEDS": torch.arange(BATCH), "CLASS_LABELS": torch.full((BATCH,), CLASS)}
    request = {name: SimpleNamespace(as_numpy=column[:, None].numpy) for name, column in columns.items()}
    return lambda: torch.from_numpy(model.execute([request])[0][0])


def _seeded() -> Callable[[], Tensor]:
    sampler = Sampler("digits", nfe=5, backend="eager")
    return lambda: sampler.run(list(range(BATCH)), class_labels=CLASS).images


def contests() -> dict[str, list[Contestant]]:
    """Per group: the engine first, then who is to draw the same."""
    bench = Bench()
    whole = AMEDPredictor(0.1, 0.05, bottleneck=(4, 4)).requires_grad_(False)
    whole.load_state_dict(bench.predictor.state_dict())
    whole.plan = make_plan(6, solver="amed", afs=False)
    pairs = {
        "per sample, NFE 5": [
            ("Sampler.run", bench.engine(bench.features, bench.predictor)),
            ("k-diffusion", bench.k_diffusion),
            ("ComfyUI", bench.comfyui),
            ("diffusers pipeline", bench.pipeline),
        ],
        "constants, NFE 5": [
            ("Sampler.run, no bottleneck", bench.engine(bench.denoised, bench.predictor)),
            ("diffusers scheduler", bench.scheduler),
        ],
        "per sample, NFE 6": [
            ("Sampler.run, NFE 6", bench.engine(bench.features, whole)),
            ("PhysicsNeMo", functools.partial(bench.physicsnemo, whole)),
        ],
        "by seeds, NFE 5": [("Sampler.run by seeds", _seeded), ("Triton Inference Server", triton)],
    }
    return {group: [Contestant(name, setup, tolerance=1e-5) for name, setup in rows] for group, rows in pairs.items()}


GROUPS = {
    "per sample, NFE 5": ("Sampler.run", "k-diffusion", "ComfyUI", "diffusers pipeline"),
    "constants, NFE 5": ("Sampler.run, no bottleneck", "diffusers scheduler"),
    "per sample, NFE 6": ("Sampler.run, NFE 6", "PhysicsNeMo"),
    "by seeds, NFE 5": ("Sampler.run by seeds", "Triton Inference Server"),
}


@pytest.mark.parametrize(("group", "contestant"), [(group, name) for group, names in GROUPS.items() for name in names])
def test_integration(group, contestant, measured, report):
    rows = measured(group, lambda: compete(contests()[group], CPU, rounds=15))
    report(group, rows, contestant)
