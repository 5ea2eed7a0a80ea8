"""`sample_amed` beside the real package's own samplers and wrappers, where it is installed.

Its `__init__` imports training code and torchvision, which a torch without CUDA may not have: what samples is imported alone.
"""

import importlib
import importlib.util
import inspect
import sys
from types import ModuleType

import pytest
import torch

from amed_engine import ConfigError, Midpoint, make_schedule
from amed_engine.integrations.k_diffusion import sample_amed

for package in ("k_diffusion", "torchdiffeq", "torchsde"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

SIGMAS = make_schedule("polynomial", 4, 0.002, 80.0)


@pytest.fixture
def package(monkeypatch):
    """k_diffusion.sampling and k_diffusion.external as shipped; only the picture functions of utils find nothing."""
    bare = ModuleType("k_diffusion")
    spec = importlib.util.find_spec("k_diffusion")
    bare.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "k_diffusion", bare)
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[1]].functional = sys.modules[names[2]]
    yield lambda name: importlib.import_module(f"k_diffusion.{name}")
    for name in [name for name in sys.modules if name.startswith("k_diffusion.")]:
        del sys.modules[name]


def network(x, t, **options):
    return torch.tanh(x) * t.reshape(-1, 1, 1, 1) + options.get("shift", 0.0)


@pytest.mark.parametrize("zero", [False, True])
def test_constants_of_one_half_are_its_dpm_solver_2(package, latents, zero):
    """With r = 1/2 and no scales AMED-Solver is what the package calls sample_dpm_2: same images, same callbacks."""
    denoiser, noise = package("external").VDenoiser(network), latents.double() * 80
    seen = {"ours": [], "theirs": []}
    common = {"extra_args": {"shift": 0.1}, "disable": True}
    sigmas = torch.cat([SIGMAS, SIGMAS.new_zeros(int(zero))])
    theirs = package("sampling").sample_dpm_2(denoiser, noise, SIGMAS, callback=seen["theirs"].append, **common)
    halves = [Midpoint(0.5)] * 3
    ours = sample_amed(denoiser, noise, sigmas, callback=seen["ours"].append, predictor=halves, **common)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for mine, its in zip(seen["ours"], seen["theirs"], strict=True):
        assert mine.keys() == its.keys()
        for key in its:
            torch.testing.assert_close(torch.as_tensor(mine[key]), torch.as_tensor(its[key]), rtol=1e-10, atol=1e-10)


def test_it_is_called_as_the_package_s_samplers_are(package):
    theirs = list(inspect.signature(package("sampling").sample_euler).parameters)[:6]
    assert list(inspect.signature(sample_amed).parameters)[:6] == theirs


def test_a_schedule_of_the_package_is_accepted(package, latents):
    sigmas = package("sampling").get_sigmas_karras(4, 0.002, 80.0)
    assert sigmas[-1] == 0
    denoiser = package("external").VDenoiser(network)
    drawn = sample_amed(denoiser, latents * 80, sigmas, disable=True, predictor=[Midpoint(0.5)] * 3)
    assert drawn.isfinite().all()
    with pytest.raises(ConfigError, match="a predictor of 2 intervals for 3"):
        sample_amed(denoiser, latents * 80, sigmas, disable=True, predictor=[Midpoint(0.5)] * 2)
