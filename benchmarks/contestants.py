"""The ways to draw a sample that this engine is measured against, and its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from harness import Contestant
from others import diffusers_loop, k_diffusion_loop, multistep
from plain_loop import INTERVALS, NFE, Evaluate, hooked, image_of, plain_loop, returned
from torch import Tensor, nn
from workloads import Workload

from amed_engine import Sampler
from amed_engine.engine.capture import CudaDevice


class Contest:
    """All contestants for one network, batch size and device. Raises Unavailable with the network."""

    def __init__(
        self, workload: Workload, batch: int, device: torch.device, *, full: bool = False, compiled: bool = True
    ):
        self.workload, self.batch, self.device, self.full = workload, batch, device, full
        self.compiled = full or (compiled and device.type == "cuda")
        self.network = workload.build().to(device)
        self.predictor = workload.predictor(device)
        generator = torch.Generator().manual_seed(batch)
        self.latents = torch.randn(batch, *workload.shape, generator=generator).to(device)
        self.classes = torch.arange(batch) % workload.classes if workload.classes else None
        one_hot = None if self.classes is None else nn.functional.one_hot(self.classes, workload.classes)
        self.labels = None if one_hot is None else one_hot.float().to(device)

    def contestants(self) -> list[Contestant]:
        """The published style first, since it is what the others are checked against."""
        gpu, floor = self.device.type == "cuda", "denoiser fp32"
        compiling = 60.0 if gpu else 0.0
        listed = [
            Contestant("plain loop", self.published, floor=floor),
            Contestant("engine fp32", self.engine, floor=floor),
            Contestant(floor, self.denoiser, calls=NFE, tolerance=None),
            Contestant("diffusers DPM-Solver++ 2M", self.diffusers, expected=self.multistep, floor=floor),
            Contestant("k-diffusion DPM-Solver++ 2M", self.k_diffusion, expected=self.multistep, floor=floor),
        ]
        if gpu:
            bf16 = torch.bfloat16
            listed += [
                Contestant("engine bf16", lambda: self.engine(autocast=bf16), tolerance=0.1, floor="denoiser bf16"),
                Contestant("denoiser bf16", lambda: self.denoiser(autocast=bf16), calls=NFE, tolerance=None),
            ]
        if self.compiled:
            listed += [
                Contestant("plain loop, compiled denoiser", self.compiled_denoiser, seconds=compiling, floor=floor),
                Contestant(
                    "engine fp32 compiled", lambda: self.engine(compile="default"), seconds=compiling, floor=floor
                ),
            ]
        if gpu and self.compiled:
            listed.append(
                Contestant(
                    "engine bf16 compiled",
                    lambda: self.engine(autocast=torch.bfloat16, compile="default"),
                    seconds=compiling,
                    tolerance=0.1,
                    floor="denoiser bf16",
                )
            )
        if self.full:
            listed.append(Contestant("compiled loop", self.compiled_loop, seconds=NFE * compiling, floor=floor))
        # TensorFloat-32, which torch allows convolutions, is worth more than float32's rounding.
        return [replace(c, tolerance=max(c.tolerance, 1e-2)) if gpu and c.tolerance else c for c in listed]

    def loop(self, evaluate: Evaluate) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return plain_loop(self.workload, evaluate, self.predictor, self.latents)

        return run

    def published(self) -> Callable[[], Tensor]:
        return self.loop(hooked(self.network, self.labels))

    def compiled_denoiser(self) -> Callable[[], Tensor]:
        network = torch.compile(self.network, mode="reduce-overhead", dynamic=False)
        return warm(self.loop(returned(network, self.labels, clone=True)))

    def compiled_loop(self) -> Callable[[], Tensor]:
        evaluate = returned(self.network, self.labels)

        @torch.compile(mode="reduce-overhead", dynamic=False)
        def loop(latents: Tensor) -> Tensor:
            return plain_loop(self.workload, evaluate, self.predictor, latents)

        def run() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                return loop(self.latents).clone()

        return warm(run)

    def engine(self, **options: Any) -> Callable[[], Tensor]:
        low, high = self.workload.sigmas
        sampler = Sampler(
            self.network,
            self.predictor,
            nfe=NFE,
            sigma_min=low,
            sigma_max=high,
            shape=self.workload.shape,
            batch_sizes=(self.batch,),
            check_finite=False,
            **options,
        )
        assert sampler.plan.intervals == INTERVALS
        assert sampler.plan.afs
        expected = "graph" if self.device.type == "cuda" else "eager"

        def run() -> Tensor:
            result = sampler.run(self.latents, class_labels=self.labels)  # on the device, as the plain loop has them
            assert result.backend == expected
            return result.images

        return warm(run)

    def outside(self, run: Callable[[], Tensor], times: int = 9) -> list[float]:
        """The share of each run that is not spent in the network, by its hooks: of the host's time, so on a CPU only."""
        shares, inside = [], 0.0

        def enter(module: nn.Module, inputs: Any) -> None:
            nonlocal inside
            inside -= time.perf_counter()

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal inside
            inside += time.perf_counter()

        hooks = [self.network.register_forward_pre_hook(enter), self.network.register_forward_hook(leave)]
        for _ in range(times):
            inside, started = 0.0, time.perf_counter()
            run()
            shares.append(1 - inside / (time.perf_counter() - started))
        for hook in hooks:
            hook.remove()
        return shares

    def denoiser(self, autocast: torch.dtype | None = None) -> Callable[[], Tensor]:
        """The network alone, NFE times; on a GPU one graph, so that nothing but its kernels is left."""
        sigma = torch.ones(self.batch, device=self.device)
        arguments = (self.latents, sigma) if self.labels is None else (self.latents, sigma, self.labels)

        def run() -> Tensor:
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, autocast, enabled=autocast is not None, cache_enabled=False),
            ):
                return [image_of(self.network(*arguments)) for _ in range(NFE)][-1]

        return graphed(run) if self.device.type == "cuda" else run

    def multistep(self) -> Tensor:
        return multistep(returned(self.network, self.labels), self.latents, self.workload.sigmas)

    def diffusers(self) -> Callable[[], Tensor]:
        return diffusers_loop(self.network, self.labels, self.latents, self.workload.sigmas)

    def k_diffusion(self) -> Callable[[], Tensor]:
        return k_diffusion_loop(returned(self.network, self.labels), self.latents, self.workload.sigmas)


def warm(run: Callable[[], Tensor], times: int = 4) -> Callable[[], Tensor]:
    """Compiled and captured things settle after a few runs; that is setup, not measurement."""
    for _ in range(times):
        run()
    return run


def graphed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same work as one CUDA graph."""
    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    for _ in range(3):
        device.side_stream(run)
    graph, output = device.record(run)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
