"""A stand-in for what the nodes touch of ComfyUI, called as ComfyUI calls; its signatures are compared with the real ones by
tests/integrations/test_comfyui_server.py.
"""

import copy
import math
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch

COND, UNCOND = 0, 1
GUIDANCE = 2.5


class EPS:
    """The scaling of latents for models of x0 + sigma noise (V_PREDICTION, EDM and X0 inherit it)."""

    sigma_min, sigma_max = torch.tensor(0.002), torch.tensor(80.0)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class CONST:
    """The same for flow models."""

    sigma_min, sigma_max, noise_scale = torch.tensor(0.001), torch.tensor(1.0), 1.0

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * (self.noise_scale * noise) + (1 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)

    def percent_to_sigma(self, percent):
        return 1 - percent


class Loud(CONST):
    noise_scale = 8.0


class ImageToImage(CONST):
    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return latent_image


class ModelSamplingDiscrete(EPS):
    sigmas = torch.linspace(0.002, 80.0, 10)


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
        model_k = KSamplerX0Inpaint(model_wrap, sigmas)
        model_k.latent_image, model_k.noise = latent_image, noise
        sampling, highest = model_wrap.inner_model.model_sampling, self.max_denoise(model_wrap, sigmas)
        x, total = sampling.noise_scaling(sigmas[0], noise, latent_image, highest), len(sigmas) - 1

        def told(step):
            assert step["sigma"].shape == step["sigma_hat"].shape == ()
            callback(step["i"], step["denoised"], step["x"], total)

        options = {"extra_args": extra_args, "callback": told, "disable": disable_pbar, **self.extra_options}
        return sampling.inverse_noise_scaling(sigmas[-1], self.sampler_function(model_k, x, sigmas, **options))


class KSamplerX0Inpaint:
    """What is masked is set back to the noised image before, and to the image after, an evaluation."""

    def __init__(self, model, sigmas):
        self.inner_model, self.sigmas = model, sigmas

    def __call__(self, x, sigma, denoise_mask, model_options={}, seed=None):  # noqa: B006
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options=model_options, seed=seed)
        sampling, kept = self.inner_model.inner_model.model_sampling, 1 - denoise_mask
        level = sigma.reshape([sigma.shape[0]] + [1] * (x.ndim - 1))
        x = x * denoise_mask + sampling.noise_scaling(level, self.noise, self.latent_image) * kept
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        return out * denoise_mask + self.latent_image * kept


class ModelPatcher:
    """What of it the nodes touch; its clones are as deep as before 0.20."""

    def __init__(self, model, sampling=EPS):
        self.network, self.model_options = model, {"transformer_options": {}}
        network = SimpleNamespace(middle_block=object())
        self.model = SimpleNamespace(model_sampling=sampling(), diffusion_model=network)

    def get_model_object(self, name):
        return getattr(self.model, name)

    def clone(self):
        other = ModelPatcher(self.network)
        other.model, other.model_options = self.model, copy.deepcopy(self.model_options)
        return other

    def set_model_patch(self, patch, name):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), patch]

    def set_model_output_block_patch(self, patch):
        self.set_model_patch(patch, "output_block_patch")


class CFGGuider:
    """Guidance by batches of conditional and unconditional parts, as `calc_cond_batch` runs them: `batches`, of `labels`."""

    batches = ([0, 1],)

    def __init__(self, model_patcher):
        self.model_patcher, self.labels, self.cfg = model_patcher, torch.eye(10)[[3, 1, 4]], GUIDANCE

    def set_cfg(self, cfg):
        self.cfg = cfg

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None
    ):
        self.inner_model = self.model_patcher.model
        arguments = {"model_options": self.model_patcher.model_options, "seed": seed}
        return sampler.sample(self, sigmas, arguments, callback, noise, latent_image, denoise_mask, disable_pbar)

    def __call__(self, *args, **kwargs):
        return self.predict_noise(*args, **kwargs)

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        assert x.dtype == timestep.dtype == torch.float32
        total, count = [torch.zeros_like(x), torch.zeros_like(x)], [0, 0]
        for flags in self.batches:
            output = self._apply(torch.cat([x] * len(flags)), torch.cat([timestep] * len(flags)), flags, timestep)
            for part, flag in zip(output.chunk(len(flags)), flags, strict=True):
                total[flag], count[flag] = total[flag] + part, count[flag] + 1
        cond, uncond = (t / n for t, n in zip(total, count, strict=True))
        return uncond + self.cfg * (cond - uncond)

    def _apply(self, x, sigma, flags, timestep):
        options = dict(self.model_patcher.model_options["transformer_options"])
        options |= {"cond_or_uncond": flags[:], "sigmas": timestep}
        labels = torch.cat([self.labels if flag == COND else torch.zeros_like(self.labels) for flag in flags])
        x0, h = self.model_patcher.network(x, sigma, labels)
        for block, given in enumerate((h, h[..., :2] * 3)):
            options["block"] = ("output", block)
            for patch in options.get("patches", {}).get("output_block_patch", []):
                assert patch(given, x, options)[0] is given
        return x0


class DualCFGGuider(CFGGuider):
    """Three prompts, in an order of their own."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        raise AssertionError("sampling began")


class SchedulerHandler(NamedTuple):
    handler: object
    use_ms: bool = True


def modules(folder):
    """The modules by name, folder_paths with an empty models folder."""
    names = ("", ".samplers", ".model_sampling", ".model_management", ".k_diffusion", ".k_diffusion.sampling")
    made = {f"comfy{name}": ModuleType(f"comfy{name}") for name in names}
    samplers, sampling = made["comfy.samplers"], made["comfy.model_sampling"]
    samplers.KSAMPLER, samplers.CFGGuider, samplers.SchedulerHandler = KSAMPLER, CFGGuider, SchedulerHandler
    samplers.KSAMPLER_NAMES, samplers.SAMPLER_NAMES = ["euler"], ["euler", "ddim"]
    samplers.SCHEDULER_HANDLERS, samplers.SCHEDULER_NAMES = {}, []
    samplers.KSampler = SimpleNamespace(SAMPLERS=samplers.SAMPLER_NAMES, SCHEDULERS=samplers.SCHEDULER_NAMES)
    sampling.CONST, sampling.ModelSamplingDiscrete = CONST, ModelSamplingDiscrete
    made["comfy.model_management"].throw_exception_if_processing_interrupted = lambda: None
    return made | {"folder_paths": folder_paths(folder)}


def folder_paths(folder):
    paths = ModuleType("folder_paths")
    paths.models_dir, paths.folder_names_and_paths = str(folder), {}

    def add_model_folder_path(folder_name, full_folder_path, is_default=False):
        known = paths.folder_names_and_paths.setdefault(folder_name, ([], set()))[0]
        if full_folder_path not in known:
            known.append(full_folder_path)

    def files(name):
        known, suffixes = paths.folder_names_and_paths[name]
        found = [file for path in known for file in sorted(folder.glob(f"{path.rpartition('/')[2]}/*"))]
        return {file.name: str(file) for file in found if not suffixes or file.suffix in suffixes}

    paths.add_model_folder_path = add_model_folder_path
    paths.get_filename_list = lambda folder_name: sorted(files(folder_name))
    paths.get_full_path = lambda folder_name, filename: files(folder_name).get(filename)
    return paths
