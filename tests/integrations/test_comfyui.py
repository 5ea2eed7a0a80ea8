"""The nodes under a stand-in that calls them as ComfyUI does: same images as the engine, whatever the order of parts."""

import inspect
import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from amed_engine import ConfigError, Sampler, save_predictor
from amed_engine.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from amed_engine.integrations.comfyui.features import ConditionalFeatures
from amed_engine.integrations.comfyui.webui import sampler_entry, schedule
from amed_engine.integrations.k_diffusion import sample_amed
from amed_engine.integrations.require import MissingDependency

COND, UNCOND = 0, 1
GUIDANCE = 2.5


class KSAMPLER:
    """Calls a sampler function with the arguments, and in the form, that ComfyUI's KSAMPLER.sample does."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, denoise_mask=None, disable_pbar=True):
        extra_args["denoise_mask"] = denoise_mask
        model_k = Inpaint(model_wrap)
        total = len(sigmas) - 1
        k_callback = None if callback is None else lambda d: callback(d["i"], d["denoised"], d["x"], total)
        scaled = noise * sigmas[0]
        return self.sampler_function(
            model_k,
            scaled,
            sigmas,
            extra_args=extra_args,
            callback=k_callback,
            disable=disable_pbar,
            **self.extra_options,
        )


class Inpaint:
    def __init__(self, model_wrap):
        self.inner_model = model_wrap

    def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
        assert denoise_mask is None
        return self.inner_model(x, sigma, model_options=model_options, seed=seed)


class Patcher:
    """What of a ModelPatcher the node touches."""

    def __init__(self, network):
        self.network, self.model_options = network, {"transformer_options": {}}

    def clone(self):
        other = Patcher(self.network)
        patches = self.model_options["transformer_options"].get("patches", {})
        other.model_options = {"transformer_options": {"patches": {k: v[:] for k, v in patches.items()}}}
        return other

    def set_model_middle_block_after_patch(self, patch):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["middle_block_after_patch"] = [*patches.get("middle_block_after_patch", []), patch]


class Guider:
    """Classifier-free guidance by batches of conditional and unconditional parts, as `calc_cond_batch` runs them."""

    def __init__(self, patcher, labels, batches):
        self.patcher, self.labels, self.batches = patcher, labels, batches

    def __call__(self, x, sigma, model_options=None, seed=None):
        assert x.dtype == sigma.dtype == torch.float32
        total, count = [torch.zeros_like(x), torch.zeros_like(x)], [0, 0]
        for flags in self.batches:
            output = self._apply(torch.cat([x] * len(flags)), torch.cat([sigma] * len(flags)), flags, sigma)
            for part, flag in zip(output.chunk(len(flags)), flags, strict=True):
                total[flag], count[flag] = total[flag] + part, count[flag] + 1
        cond, uncond = (t / n for t, n in zip(total, count, strict=True))
        return uncond + GUIDANCE * (cond - uncond)

    def _apply(self, x, sigma, flags, timestep):
        options = dict(self.patcher.model_options["transformer_options"], cond_or_uncond=flags[:], sigmas=timestep)
        labels = torch.cat([self.labels if flag == COND else torch.zeros_like(self.labels) for flag in flags])
        x0, h = self.patcher.network(x, sigma, labels)
        for patch in options.get("patches", {}).get("middle_block_after_patch", []):
            arguments = {"h": h, "x": x, "emb": None, "context": None, "y": None, "timesteps": sigma}
            assert patch({**arguments, "transformer_options": options})["h"] is h
        return x0


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """`comfy.samplers` and `folder_paths`, with a models folder."""
    package, samplers, folders = ModuleType("comfy"), ModuleType("comfy.samplers"), ModuleType("folder_paths")
    package.samplers, samplers.KSAMPLER = samplers, KSAMPLER
    folders.models_dir, folders.folder_names_and_paths = str(tmp_path), {}
    (tmp_path / "amed").mkdir()

    def listing(name):
        paths, suffixes = folders.folder_names_and_paths[name]
        return sorted(p.name for p in (tmp_path / "amed").iterdir() if p.suffix in suffixes and str(p.parent) in paths)

    folders.get_filename_list = listing
    folders.get_full_path = lambda name, file: str(tmp_path / name / file) if file in listing(name) else None
    for module in (package, samplers, folders):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return tmp_path


@pytest.fixture
def guided(predictor):
    predictor.plan = replace(predictor.plan, guidance_scale=GUIDANCE)
    return predictor


def draw(network, predictor, latents, batches, **options):
    model, sampler = NODE_CLASS_MAPPINGS["AMEDSampler"]().get_sampler(Patcher(network), predictor, **options)
    (sigmas,) = NODE_CLASS_MAPPINGS["AMEDSchedule"]().get_sigmas(predictor)
    steps = []
    labels = torch.eye(10)[[3, 1, 4]]
    arguments = {"model_options": model.model_options, "seed": 5}
    images = sampler.sample(
        Guider(model, labels, batches), sigmas, arguments, lambda *a: steps.append(a), latents, disable_pbar=True
    )
    assert [(i, total) for i, _, _, total in steps] == [(i, len(sigmas) - 1) for i in range(len(sigmas) - 1)]
    return images


ORDERS = [[[0, 1]], [[1, 0]], [[0], [1]], [[1], [0]], [[1, 0, 0]], [[0], [1, 0]]]


@pytest.mark.parametrize("batches", ORDERS, ids=str)
def test_the_nodes_draw_what_the_engine_draws_in_any_order(comfy, tiny_conditional, guided, latents, batches):
    expected = Sampler(tiny_conditional, guided).run(latents, class_labels=[3, 1, 4], guidance_scale=GUIDANCE).images
    drawn = draw(tiny_conditional, guided, latents, batches)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_unconditional_half_would_draw_something_else(comfy, tiny_conditional, guided, latents, monkeypatch):
    right = draw(tiny_conditional, guided, latents, [[0, 1]])
    monkeypatch.setattr("amed_engine.integrations.comfyui.features.CONDITIONAL", UNCOND)
    assert (draw(tiny_conditional, guided, latents, [[0, 1]]) - right).abs().max() > 1e-3


def test_a_model_without_a_middle_block_needs_the_choice_none(comfy, tiny_conditional, guided, latents):
    def bare(x, sigma, labels):
        return tiny_conditional(x, sigma, labels).x0, torch.zeros(0)

    assert draw(bare, guided, latents, [[0, 1]], bottleneck="none").isfinite().all()
    with pytest.raises(ConfigError, match="must be middle_block or none"):
        draw(bare, guided, latents, [[0, 1]], bottleneck="input")


def test_the_caller_s_model_is_not_patched(comfy, tiny_conditional, guided):
    patcher = Patcher(tiny_conditional)
    model, sampler = NODE_CLASS_MAPPINGS["AMEDSampler"]().get_sampler(patcher, guided)
    assert patcher.model_options == {"transformer_options": {}}
    assert model is not patcher
    assert sampler.sampler_function is sample_amed


def test_features_keep_no_more_than_one_evaluation():
    """The patched model may be run by any other sampler, which takes nothing."""
    features = ConditionalFeatures()
    for _ in range(5):
        options = {"cond_or_uncond": [1, 0], "sigmas": torch.ones(2)}
        features.patch({"h": torch.randn(4, 1, 2, 2), "transformer_options": options})
    assert len(features._parts) == 1
    assert features.take().shape == (2, 1, 2, 2)
    assert features.take() is None


def test_the_loader_lists_and_loads_what_is_in_the_models_folder(comfy, guided):
    node = NODE_CLASS_MAPPINGS["AMEDPredictorLoader"]
    save_predictor(guided, comfy / "amed" / "five.safetensors")
    (comfy / "amed" / "notes.txt").write_text("no predictor")
    assert node.INPUT_TYPES() == {"required": {"predictor_name": (["five.safetensors"],)}}
    (loaded,) = node().load("five.safetensors")
    assert loaded.plan == guided.plan
    with pytest.raises(ConfigError, match="no predictor 'six'"):
        node().load("six")


def test_nodes_are_declared_as_comfyui_reads_them(comfy):
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        names = list(node.INPUT_TYPES()["required"])
        assert list(inspect.signature(getattr(node(), node.FUNCTION)).parameters) == names
        assert isinstance(node.RETURN_TYPES, tuple)
        assert node.CATEGORY


def test_outside_comfyui_the_nodes_say_so(guided):
    with pytest.raises(MissingDependency, match="run inside ComfyUI"):
        NODE_CLASS_MAPPINGS["AMEDPredictorLoader"].INPUT_TYPES()


def test_a_predictor_without_levels_is_refused(comfy, guided):
    guided.plan = None
    with pytest.raises(ConfigError, match="save it with its plan"):
        NODE_CLASS_MAPPINGS["AMEDSchedule"]().get_sigmas(guided)


def test_webui_entries_draw_the_same(comfy, tiny_model, predictor, latents, expected):
    """Called as A1111 and Forge call: sigmas by name, the function's parameters looked up by inspection."""
    seen = []

    def model(x, sigma, **conditions):
        x0, features = tiny_model(x, sigma)
        seen.append(features)
        return x0

    label, function, aliases, options = sampler_entry(predictor, lambda: seen[-1])
    assert (label, aliases, options) == ("AMED", ["amed"], {})
    assert "sigmas" in inspect.signature(function).parameters
    assert math.isclose(predictor.plan.sigmas[0], 80)
    sigmas = schedule(predictor)(predictor.plan.intervals, 0.002, 80.0, "cpu")
    drawn = function(model, latents * sigmas[0], extra_args={}, disable=True, callback=lambda d: None, sigmas=sigmas)
    assert (drawn - expected).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="set the steps to that"):
        schedule(predictor)(20, 0.002, 80.0)
