"""A predictor that listens to its bottleneck, a class-conditional model, and what the engine makes of both."""

import os
import sys
from pathlib import Path

import comfy_standin
import pytest
import torch
from comfyui_client import Server
from mean_answers import make_mean

from amed_engine import AMEDPredictor, Sampler, make_plan

# `python -m pytest` puts the checkout on the path, where transformers takes its kernels/ for another package.
ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def make_predictor(plan, scale: float = 4.0) -> AMEDPredictor:
    """Random weights large enough that samples differ in r by more than 0.05."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        predictor = AMEDPredictor(0.1, 0.05, bottleneck=(4, 4))
        with torch.no_grad():
            for parameter in predictor.parameters():
                parameter.mul_(scale)
    predictor.plan = plan
    return predictor.eval()


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """ComfyUI's modules, and its models folder."""
    (tmp_path / "amed").mkdir()
    for name, module in comfy_standin.modules(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    return tmp_path


@pytest.fixture
def about_mean() -> AMEDPredictor:
    """For AMED-Solver on three intervals, the first evaluation about a mean answer."""
    return make_predictor(make_plan(5, solver="amed", afs="mean", mean=make_mean()))


@pytest.fixture(params=[4, 5], ids=["NFE4", "NFE5-AFS"])
def predictor(request) -> AMEDPredictor:
    """For AMED-Solver on two intervals, or on three with an analytic first step."""
    return make_predictor(make_plan(request.param, solver="amed"))


@pytest.fixture
def network(tiny_model):
    """The raw network F(c_in·x, log(sigma)/4) inside EDM's preconditioning."""
    return lambda scaled, t: tiny_model.model(scaled, t)[0].detach()


@pytest.fixture
def denoiser(tiny_model):
    """The same model as a denoiser without features."""
    return lambda x, sigma: tiny_model(x, sigma).x0.detach()


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def expected(tiny_model, predictor, latents) -> torch.Tensor:
    """The engine's images for these latents."""
    return Sampler(tiny_model, predictor).run(latents).images


PACK = "from amed_engine.integrations.comfyui.pack import *"
CHECKOUTS = [Path(path).resolve() for path in os.environ.get("COMFYUI", "").split(":") if path]


@pytest.fixture(scope="session", params=CHECKOUTS or [None], ids=lambda path: path.name if path else "none")
def server(request, tmp_path_factory):
    """A ComfyUI server of each checkout that COMFYUI names, with our nodes."""
    if request.param is None:
        pytest.skip("COMFYUI names no checkout of ComfyUI: make test-integrations COMFYUI=/path[:/path]")
    started = Server(request.param, tmp_path_factory.mktemp("comfyui"), PACK)
    yield started
    started.stop()
