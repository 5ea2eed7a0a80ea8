"""The ways to draw a sample that this engine is measured against, and its own.

Everything here is written from formulas: the update of AMED-Solver (arXiv:2312.00094) as separate tensor operations, and
the loops that the users of diffusers and k-diffusion write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from harness import Contestant, Unavailable
from torch import Tensor, nn
from workloads import Workload

from amed_engine import Sampler, make_solver, sample
from amed_engine.capture import CudaDevice
from amed_engine.networks import EDMPrecond

NFE = 5
INTERVALS = 3  # two evaluations each, the first of all replaced by its analytic estimate
EPSILON_T = 1e-3

# ---- the loop as published code writes it


def vp_levels(count: int, low: float, high: float, device: torch.device) -> Tensor:
    """sigma(t) = sqrt(exp(b_d t²/2 + b_0 t) - 1) at equally spaced t from 1 to 1e-3, made anew for every sample."""
    a, b = math.log1p(low**2), math.log1p(high**2)
    beta_d = 2 * (a / EPSILON_T - b) / (EPSILON_T - 1)
    t = torch.linspace(1, EPSILON_T, count, dtype=torch.float64, device=device)
    return ((beta_d * t**2 / 2 + (b - beta_d / 2) * t).exp() - 1).sqrt().float()


Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (x, sigma) -> D, bottleneck


@contextmanager
def _bottleneck(network: nn.Module) -> Iterator[list[Tensor]]:
    """What the last encoder block puts out, read by a hook."""
    seen: list[Tensor] = []
    block = list(network.model.enc.values())[-1] if hasattr(network, "model") else None
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output)) if block else None
    yield seen
    if handle is not None:
        handle.remove()


def hooked(network: nn.Module, labels: Tensor | None) -> Evaluate:
    """One evaluation, its forward hook added before and removed after."""

    def evaluate(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        with _bottleneck(network) as seen:
            denoised = _first(network(x, sigma) if labels is None else network(x, sigma, labels))
        return denoised, seen[-1] if seen else None

    return evaluate


def returned(network: Callable, labels: Tensor | None, *, clone: bool = False) -> Evaluate:
    """One evaluation of a network that returns its bottleneck: hooks do not fire in a compiled one."""

    def evaluate(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        if clone:
            torch.compiler.cudagraph_mark_step_begin()
        output = network(x, sigma) if labels is None else network(x, sigma, labels)
        denoised, features = (output, None) if isinstance(output, Tensor) else output
        if not clone:
            return denoised, features
        # The next call of a captured network writes over its outputs.
        return denoised.clone(), None if features is None else features.clone()

    return evaluate


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def plain_loop(workload: Workload, evaluate: Evaluate, predictor: nn.Module, latents: Tensor) -> Tensor:
    """AMED-Solver at NFE 5 with an analytic first step, one tensor operation after the other."""
    sigmas = vp_levels(INTERVALS + 1, *workload.sigmas, latents.device)
    batch = latents.shape[0]
    x = latents * sigmas[0]
    for i in range(INTERVALS):
        sigma, sigma_next = sigmas[i].expand(batch), sigmas[i + 1].expand(batch)
        features = None
        if i == 0:
            d = x / (1 + wide(sigma) ** 2).sqrt()
        else:
            denoised, features = evaluate(x, sigma)
            d = (x - denoised) / wide(sigma)
        r, scale_dir, scale_time = predictor(features, sigma, sigma_next)
        middle = sigma_next**r * sigma ** (1 - r)
        y = x + wide(middle - sigma) * d
        denoised, _ = evaluate(y, scale_time * middle)
        d = (y - denoised) / wide(middle)
        x = x + wide(scale_dir) * wide(sigma_next - sigma) * d
    return x


def wide(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


# ---- contestants


class Contest:
    """All contestants for one network, batch size and device. Raises Unavailable with the network."""

    def __init__(self, workload: Workload, batch: int, device: torch.device, *, full: bool = False):
        self.workload, self.batch, self.device, self.full = workload, batch, device, full
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
        if gpu or self.full:
            listed += [
                Contestant("plain loop, compiled denoiser", self.compiled_denoiser, seconds=compiling, floor=floor),
                Contestant(
                    "engine fp32 compiled", lambda: self.engine(compile="default"), seconds=compiling, floor=floor
                ),
            ]
        if gpu:
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
        return listed

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

    def denoiser(self, autocast: torch.dtype | None = None) -> Callable[[], Tensor]:
        """The network alone, NFE times; on a GPU one graph, so that nothing but its kernels is left."""
        sigma = torch.ones(self.batch, device=self.device)
        arguments = (self.latents, sigma) if self.labels is None else (self.latents, sigma, self.labels)

        def run() -> Tensor:
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, autocast, enabled=autocast is not None, cache_enabled=False),
            ):
                return [_first(self.network(*arguments)) for _ in range(NFE)][-1]

        return graphed(run) if self.device.type == "cuda" else run

    def multistep(self) -> Tensor:
        """What DPM-Solver++ 2M of other libraries must give: NFE - 1 steps, then the denoised image."""
        solver = make_solver("dpmpp", max_order=2, thresholding=False, lower_order_final=False)
        levels = karras_levels(*self.workload.sigmas)
        evaluate = returned(self.network, self.labels)
        with torch.no_grad():
            return sample(evaluate, self.latents * float(levels[0]), levels, solver, denoise_to_zero=True)

    def diffusers(self) -> Callable[[], Tensor]:
        if find_spec("diffusers") is None:
            raise Unavailable("diffusers is not installed")
        if not isinstance(self.network, EDMPrecond):
            raise Unavailable("its EDM scheduler wants a network with EDM's preconditioning")
        from diffusers import EDMDPMSolverMultistepScheduler

        low, high = self.workload.sigmas
        raw, sd = self.network.model, self.network.sigma_data

        def run() -> Tensor:
            scheduler = EDMDPMSolverMultistepScheduler(sigma_min=low, sigma_max=high, sigma_data=sd)
            scheduler.set_timesteps(NFE, device=self.device)
            x = self.latents * levels_0
            with torch.no_grad():
                for t in scheduler.timesteps:
                    output, _ = raw(scheduler.scale_model_input(x, t), t.expand(self.batch), self.labels)
                    x = scheduler.step(output, t, x, return_dict=False)[0]
            return x

        levels_0 = float(karras_levels(low, high)[0])
        return run

    def k_diffusion(self) -> Callable[[], Tensor]:
        if find_spec("k_diffusion") is None:
            raise Unavailable("k-diffusion is not installed")
        from k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m

        evaluate = returned(self.network, self.labels)
        low, high = self.workload.sigmas

        def run() -> Tensor:
            sigmas = get_sigmas_karras(NFE, low, high, device=self.device)
            with torch.no_grad():
                return sample_dpmpp_2m(lambda x, s: evaluate(x, s)[0], self.latents * sigmas[0], sigmas, disable=True)

        return run


def karras_levels(low: float, high: float, rho: float = 7.0) -> Tensor:
    """Both libraries' schedule without the zero they append."""
    ramp = torch.linspace(0, 1, NFE, dtype=torch.float64)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


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
