"""DPM-Solver++ 2M at the same number of evaluations, as the users of diffusers and of k-diffusion draw it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from harness import Unavailable
from plain_loop import NFE, Evaluate
from torch import Tensor, nn

from amed_engine import make_solver, sample
from amed_engine.networks import EDMPrecond

Levels = tuple[float, float]  # sigma_min, sigma_max


def karras_levels(low: float, high: float, rho: float = 7.0) -> Tensor:
    """Both libraries' schedule without the zero they append."""
    ramp = torch.linspace(0, 1, NFE, dtype=torch.float64)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def multistep(evaluate: Evaluate, latents: Tensor, sigmas: Levels) -> Tensor:
    """What both must give: NFE - 1 steps, then the denoised image."""
    solver = make_solver("dpmpp", max_order=2, thresholding=False, lower_order_final=False)
    levels = karras_levels(*sigmas)
    with torch.no_grad():
        return sample(evaluate, latents * float(levels[0]), levels, solver, denoise_to_zero=True)


def diffusers_loop(network: nn.Module, labels: Tensor | None, latents: Tensor, sigmas: Levels) -> Callable[[], Tensor]:
    if find_spec("diffusers") is None:
        raise Unavailable("diffusers is not installed")
    if not isinstance(network, EDMPrecond):
        raise Unavailable("its EDM scheduler wants a network with EDM's preconditioning")
    from diffusers import EDMDPMSolverMultistepScheduler

    low, high = sigmas
    raw, sd, highest = network.model, network.sigma_data, float(karras_levels(low, high)[0])

    def run() -> Tensor:
        scheduler = EDMDPMSolverMultistepScheduler(sigma_min=low, sigma_max=high, sigma_data=sd)
        scheduler.set_timesteps(NFE, device=latents.device)
        x = latents * highest
        with torch.no_grad():
            for t in scheduler.timesteps:
                output, _ = raw(scheduler.scale_model_input(x, t), t.expand(len(x)), labels)
                x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    return run


def k_diffusion_loop(evaluate: Evaluate, latents: Tensor, sigmas: Levels) -> Callable[[], Tensor]:
    sampling = k_diffusion_sampling()

    def run() -> Tensor:
        levels = sampling.get_sigmas_karras(NFE, *sigmas, device=latents.device)
        with torch.no_grad():
            return sampling.sample_dpmpp_2m(lambda x, s: evaluate(x, s)[0], latents * levels[0], levels, disable=True)

    return run


def k_diffusion_sampling() -> Any:
    """k_diffusion.sampling alone: the package imports what training needs, which those who only sample need not have."""
    spec = find_spec("k_diffusion")
    if spec is None:
        raise Unavailable("k-diffusion is not installed")
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or ())
    pictures = ModuleType("torchvision.transforms")
    pictures.functional = None  # type: ignore[attr-defined]  # of functions for pictures, which nothing here calls
    stand_ins = {"k_diffusion": package}
    if find_spec("torchvision") is None:
        stand_ins |= {"torchvision": ModuleType("torchvision"), "torchvision.transforms": pictures}
    try:
        with _standing_in(stand_ins):
            return import_module("k_diffusion.sampling")
    except ImportError as error:
        raise Unavailable(f"k-diffusion cannot be imported: {error}") from error


@contextmanager
def _standing_in(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Let imports find these; afterwards nobody does, nor what came with them."""
    before = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] == "k_diffusion"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n in modules or n.partition(".")[0] == "k_diffusion"]:
            del sys.modules[name]
        sys.modules.update(before)
