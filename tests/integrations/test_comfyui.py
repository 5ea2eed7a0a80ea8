"""The nodes under a stand-in that calls them as ComfyUI does: same images as the engine, whatever the order of parts."""

import copy
import inspect
import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from mean_answers import make_mean

from amed_engine import ConfigError, Sampler, make_plan, save_predictor
from amed_engine.errors import MissingDependency
from amed_engine.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from amed_engine.integrations.comfyui.features import ConditionalFeatures
from amed_engine.integrations.comfyui.webui import sampler_entry, schedule
from amed_engine.integrations.k_diffusion import sample_amed
from amed_engine.sampling.denoiser import Denoised

COND, UNCOND = 0, 1
GUIDANCE = 2.5


class EPS:
    """ComfyUI's scaling of latents for models of x0 + sigma noise (V_PREDICTION, EDM and X0 inherit it)."""

    sigma_max = torch.tensor(80.0)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class CONST:
    """The same for flow models."""

    sigma_max = torch.tensor(1.0)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)


class ImageToImage(CONST):
    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return latent_image


class KSAMPLER:
    """Calls a sampler function with the arguments, and in the form, that ComfyUI's KSAMPLER.sample does."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def max_denoise(self, model_wrap, sigmas):
        highest = float(model_wrap.inner_model.model_sampling.sigma_max)
        return math.isclose(highest, float(sigmas[0]), rel_tol=1e-5) or float(sigmas[0]) > highest

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        extra_args["denoise_mask"] = denoise_mask
        model_k = Inpaint(model_wrap, sigmas)
        model_k.latent_image, model_k.noise = latent_image, noise
        sampling, highest = model_wrap.inner_model.model_sampling, self.max_denoise(model_wrap, sigmas)
        x, total = sampling.noise_scaling(sigmas[0], noise, latent_image, highest), len(sigmas) - 1

        def told(step):
            assert step["sigma"].shape == step["sigma_hat"].shape == ()
            callback(step["i"], step["denoised"], step["x"], total)

        options = {"extra_args": extra_args, "callback": told, "disable": disable_pbar, **self.extra_options}
        return sampling.inverse_noise_scaling(sigmas[-1], self.sampler_function(model_k, x, sigmas, **options))


class Inpaint:
    """KSamplerX0Inpaint: what is masked is set back to the noised image before, and to the image after, an evaluation."""

    def __init__(self, model_wrap, sigmas):
        self.inner_model, self.sigmas = model_wrap, sigmas

    def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options=model_options, seed=seed)
        sampling, kept = self.inner_model.inner_model.model_sampling, 1 - denoise_mask
        level = sigma.reshape([sigma.shape[0]] + [1] * (x.ndim - 1))
        x = x * denoise_mask + sampling.noise_scaling(level, self.noise, self.latent_image) * kept
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        return out * denoise_mask + self.latent_image * kept


class Patcher:
    """What of a ModelPatcher the nodes touch."""

    def __init__(self, network, sampling=EPS):
        self.network, self.model_options = network, {"transformer_options": {}}
        self.model = SimpleNamespace(model_sampling=sampling())

    def get_model_object(self, name):
        return getattr(self.model, name)

    def clone(self):
        other = Patcher(self.network, type(self.model.model_sampling))
        patches = self.model_options["transformer_options"].get("patches", {})
        other.model_options = {"transformer_options": {"patches": {k: v[:] for k, v in patches.items()}}}
        return other

    def set_model_middle_block_after_patch(self, patch):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["middle_block_after_patch"] = [*patches.get("middle_block_after_patch", []), patch]


class Guider:
    """CFGGuider: guidance by batches of conditional and unconditional parts, as `calc_cond_batch` runs them."""

    def __init__(self, patcher, labels, batches, cfg=GUIDANCE):
        self.model_patcher, self.labels, self.batches, self.cfg = patcher, labels, batches, cfg

    def sample(self, noise, latent_image, sampler, sigmas, callback, denoise_mask=None):
        """As SamplerCustom calls it."""
        self.inner_model = self.model_patcher.model
        arguments = {"model_options": self.model_patcher.model_options, "seed": 5}
        return sampler.sample(self, sigmas, arguments, callback, noise, latent_image, denoise_mask, True)

    def __call__(self, x, sigma, model_options=None, seed=None):
        assert x.dtype == sigma.dtype == torch.float32
        total, count = [torch.zeros_like(x), torch.zeros_like(x)], [0, 0]
        for flags in self.batches:
            output = self._apply(torch.cat([x] * len(flags)), torch.cat([sigma] * len(flags)), flags, sigma)
            for part, flag in zip(output.chunk(len(flags)), flags, strict=True):
                total[flag], count[flag] = total[flag] + part, count[flag] + 1
        cond, uncond = (t / n for t, n in zip(total, count, strict=True))
        return uncond + self.cfg * (cond - uncond)

    def _apply(self, x, sigma, flags, timestep):
        options = dict(self.model_patcher.model_options["transformer_options"])
        options |= {"cond_or_uncond": flags[:], "sigmas": timestep}
        labels = torch.cat([self.labels if flag == COND else torch.zeros_like(self.labels) for flag in flags])
        x0, h = self.model_patcher.network(x, sigma, labels)
        for patch in options.get("patches", {}).get("middle_block_after_patch", []):
            arguments = {"h": h, "x": x, "emb": None, "context": None, "y": None, "timesteps": sigma}
            assert patch({**arguments, "transformer_options": options})["h"] is h
        return x0


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """`comfy.samplers`, `comfy.model_sampling` and `folder_paths`, with a models folder."""
    package, samplers, sampling = (ModuleType(f"comfy{name}") for name in ("", ".samplers", ".model_sampling"))
    folders = ModuleType("folder_paths")
    package.samplers, package.model_sampling, samplers.KSAMPLER, sampling.CONST = samplers, sampling, KSAMPLER, CONST
    folders.models_dir, folders.folder_names_and_paths = str(tmp_path), {}
    (tmp_path / "amed").mkdir()

    def listing(name):
        paths, suffixes = folders.folder_names_and_paths[name]
        return sorted(p.name for p in (tmp_path / "amed").iterdir() if p.suffix in suffixes and str(p.parent) in paths)

    folders.get_filename_list = listing
    folders.get_full_path = lambda name, file: str(tmp_path / name / file) if file in listing(name) else None
    for module in (package, samplers, sampling, folders):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return tmp_path


@pytest.fixture
def guided(predictor):
    predictor.plan = replace(predictor.plan, guidance_scale=GUIDANCE)
    return predictor


def draw(
    network, predictor, latents, batches, sampling=EPS, mask=None, image=None, cfg=GUIDANCE, zero=False, **options
):
    """SamplerCustom, with the three nodes before it."""
    patcher = Patcher(network, sampling)
    model, sampler = NODE_CLASS_MAPPINGS["AMEDSampler"]().get_sampler(patcher, predictor, **options)
    (sigmas,) = NODE_CLASS_MAPPINGS["AMEDSchedule"]().get_sigmas(predictor, patcher)
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]) if zero else sigmas
    guider, steps = Guider(model, torch.eye(10)[[3, 1, 4]], batches, cfg), []
    image = torch.zeros_like(latents) if image is None else image
    drawn = guider.sample(latents, image, sampler, sigmas, lambda *step: steps.append(step), mask)
    assert [step[0] for step in steps] == list(range(predictor.plan.intervals))
    assert all(x0.shape == x.shape == latents.shape and total == len(sigmas) - 1 for _, x0, x, total in steps)
    return drawn


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


@pytest.mark.parametrize("zero", [False, True])
def test_a_flow_model_draws_the_same_by_its_own_times(comfy, tiny_conditional, guided, latents, zero):
    """The same network as a flow model: its state x_t = (1 - t) x0 + t noise is (1 - t) x of sigma = t / (1 - t)."""

    def flow(x, t, labels):
        assert (t < 1).all()
        rest = (1 - t).reshape(-1, 1, 1, 1)
        return tiny_conditional(x / rest, t / (1 - t), labels)

    # To t = 0.9: nearer to 1, float32 loses the digits of 1 - t.
    guided.plan = make_plan(4, solver="amed", afs=False, sigma_max=9.0, guidance_scale=GUIDANCE)
    expected = Sampler(tiny_conditional, guided).run(latents, class_labels=[3, 1, 4], guidance_scale=GUIDANCE).images
    drawn = draw(flow, guided, latents, [[1, 0]], CONST, zero=zero)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_first_step_about_a_mean_is_guided_as_the_images_are(comfy, tiny_conditional, about_mean, latents, rows):
    """One for all, or one for no class and one for any, which guidance makes one."""
    mean = make_mean(rows, 10 * (rows - 1))
    about_mean.plan = make_plan(5, solver="amed", afs="mean", mean=mean, guidance_scale=GUIDANCE)
    drawn = draw(tiny_conditional, about_mean, latents, [[1, 0]])
    if rows == 1:  # the engine wants one for no class beside it
        about_mean.plan = about_mean.plan.about(replace(mean, data=mean.data * 2, classes=10))
    asked = {"class_labels": [3, 1, 4], "guidance_scale": GUIDANCE}
    expected = Sampler(tiny_conditional, about_mean).run(latents, **asked).images
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_flow_model_starts_about_the_same_mean(comfy, tiny_conditional, about_mean, latents):
    def flow(x, t, labels):
        rest = (1 - t).reshape(-1, 1, 1, 1)
        return tiny_conditional(x / rest, t / (1 - t), labels)

    options = {"sigma_max": 9.0, "guidance_scale": GUIDANCE}
    about_mean.plan = make_plan(5, solver="amed", afs="mean", mean=make_mean(2, 10, sigma=9.0), **options)
    asked = {"class_labels": [3, 1, 4], "guidance_scale": GUIDANCE}
    expected = Sampler(tiny_conditional, about_mean).run(latents, **asked).images
    drawn = draw(flow, about_mean, latents, [[1, 0]], CONST)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_mean_for_each_class_is_refused_when_the_sampler_is_made(comfy, tiny_conditional, about_mean):
    about_mean.plan = about_mean.plan.about(make_mean(11, 10))
    match = "a mean answer for each of 10 classes, and no class is seen here; use Sampler or AMEDPipeline"
    with pytest.raises(ConfigError, match=match):
        NODE_CLASS_MAPPINGS["AMEDSampler"]().get_sampler(Patcher(tiny_conditional), about_mean)
    with pytest.raises(ConfigError, match=match):
        sampler_entry(about_mean)
    about_mean.plan = replace(about_mean.plan, mean=None)
    with pytest.raises(ConfigError, match="yet to be measured"):
        sampler_entry(about_mean)


def test_a_flow_model_is_not_given_the_levels_of_another(comfy, tiny_conditional, guided, latents):
    _, sampler = NODE_CLASS_MAPPINGS["AMEDSampler"]().get_sampler(Patcher(tiny_conditional, CONST), guided)
    (sigmas,) = NODE_CLASS_MAPPINGS["AMEDSchedule"]().get_sigmas(guided)
    guider = Guider(Patcher(tiny_conditional, CONST), None, [[1, 0]])
    with pytest.raises(ConfigError, match="connect AMED Schedule with this MODEL"):
        guider.sample(latents, torch.zeros_like(latents), sampler, sigmas, None)
    with pytest.raises(ConfigError, match="does not start from noise"):
        NODE_CLASS_MAPPINGS["AMEDSampler"]().get_sampler(Patcher(tiny_conditional, ImageToImage), guided)


@pytest.fixture
def image(latents):
    """One whose sum with the noise, 80 times the latents, is exact: these are rounded to a grid too."""
    latents.copy_((latents * 2**16).round() / 2**16)
    return 80 * torch.randint(0, 2**10, latents.shape, generator=torch.Generator().manual_seed(2)) / 2**16


def test_sampling_starts_from_an_image(comfy, tiny_conditional, guided, latents, image):
    shifted = latents + image / 80
    expected = Sampler(tiny_conditional, guided).run(shifted, class_labels=[3, 1, 4], guidance_scale=GUIDANCE).images
    drawn = draw(tiny_conditional, guided, latents, [[1, 0]], image=image)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()
    assert draw(tiny_conditional, guided, torch.zeros_like(latents), [[1, 0]], image=image).isfinite().all()


def test_a_mask_keeps_the_image_as_it_does_for_the_engine(comfy, tiny_conditional, guided, latents, image):
    mask = torch.zeros_like(latents)
    mask[..., 4:] = 1
    masked = copy.deepcopy(tiny_conditional)

    def forward(x, sigma, labels):
        count = len(x) // len(latents)
        keep, noised = mask.repeat(count, 1, 1, 1), image + sigma[:3].reshape(-1, 1, 1, 1) * latents
        x0, features = tiny_conditional(x * keep + noised.repeat(count, 1, 1, 1) * (1 - keep), sigma, labels)
        return Denoised(x0 * keep + image.repeat(count, 1, 1, 1) * (1 - keep), features)

    masked.forward = forward
    shifted = latents + image / 80
    expected = Sampler(masked, guided).run(shifted, class_labels=[3, 1, 4], guidance_scale=GUIDANCE).images
    drawn = draw(tiny_conditional, guided, latents, [[0, 1]], image=image, mask=mask)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_part_of_the_levels_is_refused(comfy, tiny_conditional, guided, latents):
    """denoise < 1 cuts the schedule; a predictor is for the whole of it."""
    model, sampler = NODE_CLASS_MAPPINGS["AMEDSampler"]().get_sampler(Patcher(tiny_conditional), guided)
    (sigmas,) = NODE_CLASS_MAPPINGS["AMEDSchedule"]().get_sigmas(guided)
    with pytest.raises(ConfigError, match="this predictor was trained for"):
        Guider(model, None, [[1, 0]]).sample(latents, torch.zeros_like(latents), sampler, sigmas[1:], None)


def test_another_guidance_than_the_predictor_s_is_refused(comfy, tiny_conditional, guided, latents):
    with pytest.raises(ConfigError, match=r"trained with cfg 2\.5, got 8; set cfg to that"):
        draw(tiny_conditional, guided, latents, [[1, 0]], cfg=8.0)


def test_parts_that_cannot_be_told_apart_are_refused():
    def after(*parts):
        features = ConditionalFeatures()
        for flags, size in parts:
            options = {"cond_or_uncond": flags, "sigmas": None}
            features.patch({"h": torch.zeros(len(flags), 1, size, size), "transformer_options": options})
        return features.take()

    with pytest.raises(ConfigError, match="use CFG Guider"):
        after(([2, 1, 0], 2))
    with pytest.raises(ConfigError, match="areas of different size"):
        after(([0, 1], 2), ([0], 3))


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
        names = [name for kind in ("required", "optional") for name in node.INPUT_TYPES().get(kind, {})]
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


@pytest.mark.parametrize("first", ["the predictor's own", "about a mean"])
def test_webui_entries_draw_the_same(comfy, tiny_model, predictor, about_mean, latents, first):
    """Called as A1111 and Forge call: sigmas by name, the function's parameters looked up by inspection."""
    predictor, seen = about_mean if first == "about a mean" else predictor, []
    expected = Sampler(tiny_model, predictor).run(latents).images

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
