"""Graphs for the tests on real ComfyUI servers, and the predictors and plans in them."""

import json

import torch
from comfyui_client import Graph

from amed_engine import AMEDPredictor, make_plan, save_predictor
from amed_engine.sampling.predictors import ConstantPredictor
from amed_engine.solvers.stage import Midpoint

SEED, GUIDANCE = 11, 2.5
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion 1's
TABLE = (1 / (1 - BETAS).cumprod(0) - 1).sqrt()
LOW, HIGH = TABLE[0].item(), TABLE[-1].item()


def unet_plan(nfe=4, **options):
    options = {"sigma_min": LOW, "sigma_max": HIGH, "guidance_scale": GUIDANCE, "afs": False, **options}
    return make_plan(nfe, solver="amed", schedule="polynomial", **options)


def reading(plan, size=4, seed=7):
    """A predictor that reads a middle block, large enough to tell samples apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = AMEDPredictor(0.1, 0.05, bottleneck=(size, size))
        with torch.no_grad():
            for parameter in predictor.parameters():
                parameter.mul_(4)
    predictor.plan = plan
    return predictor.eval()


def constant(plan):
    predictor = ConstantPredictor.of([Midpoint(0.4 + 0.1 * i, 1.02, 0.99) for i in range(plan.intervals)])
    predictor.plan = plan
    return predictor


class Work:
    """A graph with a network, conditions and a latent image, for the nodes and for the reference."""

    def __init__(self, server, kind="unet", image=None, size=64, batch=2):
        self.server, self.graph = server, Graph()
        add = self.graph.add
        self.model = add("UNETLoader", unet_name=f"{kind}.safetensors", weight_dtype="default")
        width, pooled = (768, 0) if kind == "unet" else (4096, 64)
        self.positive, self.negative = (add("TestCondition", seed=s, width=width, pooled=pooled) for s in (1, 2))
        empty = "EmptyLatentImage" if kind == "unet" else "EmptySD3LatentImage"
        self.latent = add(empty, width=size, height=size, batch_size=batch)
        if image is not None:
            self.latent = add("TestImage", latent=self.latent, masked=image == "masked")

    def file(self, predictor, name="mine.safetensors", folder="amed"):
        self.path = self.server.base / "models" / folder / name
        save_predictor(predictor, self.path)
        return self.graph.add("AMEDPredictorLoader", predictor_name=name)

    def predictor(self, loaded, bottleneck="middle_block", **schedule):
        """(model, SAMPLER, SIGMAS)"""
        both = self.graph.add("AMEDSampler", model=self.model, predictor=loaded, bottleneck=bottleneck)
        sigmas = self.graph.add("AMEDSchedule", predictor=loaded, model=self.model, **schedule)
        return both, both[1], sigmas

    def sample(self, model, sampler, sigmas, cfg=GUIDANCE):
        named = {"positive": self.positive, "negative": self.negative, "latent_image": self.latent}
        drawn = self.graph.add(
            "SamplerCustom",
            model=model,
            add_noise=True,
            noise_seed=SEED,
            cfg=cfg,
            sampler=sampler,
            sigmas=sigmas,
            **named,
        )
        return self.save(drawn)

    def save(self, drawn):
        return self.graph.add("SaveLatent", samples=drawn, filename_prefix="drawn")

    def reference(self, model=None, cfg=GUIDANCE, **recipe):
        named = {"positive": self.positive, "negative": self.negative, "latent": self.latent, "seed": SEED}
        recipe = json.dumps({"cfg": cfg, **recipe})
        return self.save(self.graph.add("TestReference", model=model or self.model, recipe=recipe, **named))

    def check(self, drawn, expected):
        """Equal to 1e-5 of their size, and the two samples of the batch differ."""
        latents = self.server.run(self.graph)
        drawn, expected = latents[drawn], latents[expected]
        assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (drawn[0] - drawn[1]).abs().max() > 1e-2 * drawn.abs().max()
        return drawn


def solver_node(work, **options):
    options = {"solver": "ipndm", "nfe": 6, "schedule": "polynomial", "afs": "off", "denoise": 1.0, **options}
    node = work.graph.add("AMEDSolver", model=work.model, **options)
    return work.model, node, node[1]


def guided(work, kind, model, sampler, sigmas, **named):
    """SamplerCustomAdvanced with a guider of several prompts."""
    guider = work.graph.add(kind, model=model, **named)
    noise = work.graph.add("RandomNoise", noise_seed=SEED)
    named = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": work.latent}
    return work.save(work.graph.add("SamplerCustomAdvanced", **named))


def dual(work, cfg, server):
    named = {"cond1": work.positive, "cond2": work.negative, "negative": work.negative}
    named |= {"cfg_conds": cfg, "cfg_cond2_negative": cfg}
    told = server.get("object_info/DualCFGGuider")["DualCFGGuider"]["input"]["required"]
    return {**named, **({"style": "regular"} if "style" in told else {})}
