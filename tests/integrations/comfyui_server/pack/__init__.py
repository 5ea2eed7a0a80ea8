"""Nodes for the tests: conditions without a text encoder, a slow model, and what `amed_engine.Sampler` draws of a MODEL."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.sample
import torch

from amed_engine import Sampler
from amed_engine.checkpoints import load_predictor
from amed_engine.sampling.denoiser import Denoised
from amed_engine.solvers.plan import Plan


class Condition:
    """Random prompt embeddings (1, 4, width), and pooled ones."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {}), "width": ("INT", {"max": 8192}), "pooled": ("INT", {"max": 8192})}}

    def make(self, seed, width, pooled):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randn(1, 4, width, generator=generator)
        return ([[prompt, {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}]],)


class Image:
    """A latent image of random numbers, with a mask that keeps its left half or none."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "masked": ("BOOLEAN", {})}}

    def make(self, latent, masked):
        empty = latent["samples"]
        image = torch.randn(empty.shape, generator=torch.Generator().manual_seed(9))
        mask = torch.ones(len(empty), 1, *empty.shape[2:])
        mask[..., : mask.shape[-1] // 2] = 0
        return ({"samples": image, **({"noise_mask": mask} if masked else {})},)


class Slow:
    """A model whose every evaluation takes half a second and adds a line to a file."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "log": ("STRING", {})}}

    def make(self, model, log):
        def slow(apply, arguments):
            with Path(log).open("a") as file:
                file.write("evaluated\n")
            time.sleep(0.5)
            return apply(arguments["input"], arguments["timestep"], **arguments["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(slow)
        return (model,)


class Reference:
    """What Sampler draws with the network of a MODEL. recipe: JSON of {predictor: path} or {plan: ...}, cfg, reads, ratio."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "draw", "test"

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")  # the file may be another

    @classmethod
    def INPUT_TYPES(cls):
        conditions = {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
        rest = {"latent": ("LATENT",), "seed": ("INT", {}), "recipe": ("STRING", {})}
        return {"required": {"model": ("MODEL",), **conditions, **rest}}

    def draw(self, model, positive, negative, latent, seed, recipe):
        comfy.model_management.load_models_gpu([model])
        recipe, samples = json.loads(recipe), latent["samples"]
        noise = comfy.sample.prepare_noise(samples, seed)
        image = model.model.process_latent_in(samples) if samples.any() else samples
        network = Network(model, positive, negative, recipe, noise, image, latent.get("noise_mask"))
        plan = Plan.from_json(recipe["plan"]) if "plan" in recipe else None
        predictor = load_predictor(recipe["predictor"]) if "predictor" in recipe else None
        if predictor is not None:
            plan, predictor.plan = None, replace(predictor.plan, guidance_scale=None)
        first = (plan or predictor.plan).sigmas[0]
        z = noise * recipe.get("ratio", 1.0) + image / first
        options = {"predictor": predictor} if plan is None else {"plan": plan}
        drawn = Sampler(network, **options, shape=tuple(z.shape[1:])).run(z).images
        return ({"samples": model.model.process_latent_out(drawn)},)


class Network(torch.nn.Module):
    """D(x; sigma) of the host's model under guidance, with the middle block's conditional rows."""

    def __init__(self, model, positive, negative, recipe, noise, image, mask):
        super().__init__()
        self.base, self.cfg, self.reads = model.model, recipe["cfg"], recipe.get("reads", False)
        self.options = model.model_options["transformer_options"]
        self.flow = hasattr(model.model.model_sampling, "shift")
        self.conditions = [positive[0], negative[0]]
        self.noise, self.image, self.mask = noise, image, mask

    def forward(self, x, sigma):
        batch, level = len(x), sigma.reshape(-1, 1, 1, 1)
        if self.mask is not None:
            x = x * self.mask + (self.image + level * self.noise) * (1 - self.mask)
        d, h = self.guided(x, sigma, level)
        if self.mask is not None:
            d = d * self.mask + self.image * (1 - self.mask)
        return Denoised(d, h[:batch] if self.reads else None)

    def guided(self, x, sigma, level):
        t = sigma.double() / (1 + sigma.double()) if self.flow else sigma
        x = (x / (1 + level) if self.flow else x).repeat(2, 1, 1, 1)
        named = {"c_crossattn": torch.cat([c[0].repeat(len(sigma), 1, 1) for c in self.conditions])}
        if "pooled_output" in self.conditions[0][1]:
            named["y"] = torch.cat([c[1]["pooled_output"].repeat(len(sigma), 1) for c in self.conditions])
        heard = []
        hook = self.listen(heard) if self.reads else None
        try:
            options = {**self.options, "cond_or_uncond": [0, 1], "sigmas": sigma}
            answer = self.base.apply_model(x, t.float().repeat(2), transformer_options=options, **named)
        finally:
            if hook is not None:
                hook.remove()
        cond, uncond = answer.chunk(2)
        return uncond + self.cfg * (cond - uncond), heard[0] if heard else None

    def listen(self, heard):
        last = self.base.diffusion_model.middle_block[-1]
        return last.register_forward_hook(lambda module, inputs, h: heard.append(h.clone()))


NODE_CLASS_MAPPINGS = {f"Test{node.__name__}": node for node in (Condition, Image, Slow, Reference)}
print("amed test pack beside Python", sys.version.split()[0])
