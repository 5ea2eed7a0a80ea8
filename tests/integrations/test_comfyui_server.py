"""Real ComfyUI servers on the CPU, asked over HTTP: what the nodes draw is what Sampler draws with the same network.

COMFYUI names checkouts, separated by colons; COMFYUI_PYTHON the Python that has their requirements and this package, unless it
is the one that runs the tests.
"""

import importlib.util
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from amed_engine import AMEDPredictor, make_plan, make_schedule, save_predictor
from amed_engine.sampling.predictors import ConstantPredictor
from amed_engine.solvers.stage import Midpoint

CHECKOUTS = [Path(path).resolve() for path in os.environ.get("COMFYUI", "").split(":") if path]
pytestmark = pytest.mark.skipif(
    not CHECKOUTS, reason="COMFYUI names no checkout of ComfyUI: make test-integrations COMFYUI=/path[:/path]"
)


def _load(name):
    path = Path(__file__).parent / "comfyui_server" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"comfyui_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


client = _load("client")
Graph, Refused = client.Graph, client.Refused
SEED, GUIDANCE = 11, 2.5
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion 1's
TABLE = (1 / (1 - BETAS).cumprod(0) - 1).sqrt()
LOW, HIGH = TABLE[0].item(), TABLE[-1].item()
NODES = ("AMEDPredictorLoader", "AMEDSchedule", "AMEDSampler", "AMEDSolver", "AMEDConstants")
LINES = {"new": "from amed_engine.integrations.comfyui.pack import *"}
LINES["old"] = "from amed_engine.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS"


@pytest.fixture(scope="module", params=CHECKOUTS or [None], ids=lambda path: path and path.name)
def server(request, tmp_path_factory):
    started = client.Server(request.param, tmp_path_factory.mktemp("comfyui"), LINES["new"])
    yield started
    started.stop()


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

    def predictor(self, loaded, bottleneck="middle_block"):
        """(model, SAMPLER, SIGMAS)"""
        both = self.graph.add("AMEDSampler", model=self.model, predictor=loaded, bottleneck=bottleneck)
        sigmas = self.graph.add("AMEDSchedule", predictor=loaded, model=self.model)
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


def test_every_node_is_there_with_its_tooltips(server):
    for name in NODES:
        told = server.get(f"object_info/{name}")[name]
        assert told["display_name"] != name
        assert told["description"]
        assert all(told["output_tooltips"])
        sockets = {**told["input"]["required"], **told["input"].get("optional", {})}
        assert all(socket[1]["tooltip"] for socket in sockets.values())


def test_the_lists_of_ksampler_have_our_solvers_and_schedules(server):
    lists = server.get("object_info/KSampler")["KSampler"]["input"]["required"]
    samplers, schedulers = (
        lists[name][0] if isinstance(lists[name][0], list) else lists[name][1]["options"]
        for name in ("sampler_name", "scheduler")
    )
    assert {"euler", "amed_ipndm", "amed_deis", "amed_unipc", "amed_heun"} <= set(samplers)
    assert {"karras", "amed_polynomial", "amed_time_uniform", "amed_logsnr"} <= set(schedulers)


@pytest.mark.parametrize("nfe", [4, 5], ids=["NFE4", "NFE5-AFS"])
def test_a_predictor_that_reads_the_middle_block(server, nfe):
    work = Work(server)
    drawn = work.sample(*work.predictor(work.file(reading(unet_plan(nfe, afs=nfe == 5)))))
    work.check(drawn, work.reference(predictor=str(work.path), reads=True))


def test_what_the_middle_block_says_counts(server):
    work = Work(server)
    loaded = work.file(reading(unet_plan()))
    heard = work.sample(*work.predictor(loaded))
    deaf = work.sample(*work.predictor(loaded, "none"))
    latents = server.run(work.graph)
    assert (latents[heard] - latents[deaf]).abs().max() > 1e-3


@pytest.mark.parametrize("later", ["FreeU", "ModelSamplingDiscrete"])
def test_nodes_after_ours_do_not_disturb_what_is_heard(server, later):
    """FreeU writes to what the middle block gave; every node clones the patches of the one before."""
    options = {"FreeU": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}}.get(
        later, {"sampling": "v_prediction", "zsnr": False}
    )
    work = Work(server)
    model, sampler, sigmas = work.predictor(work.file(reading(unet_plan())))
    drawn = work.sample(work.graph.add(later, model=model, **options), sampler, sigmas)
    changed = work.graph.add(later, model=work.model, **options)
    work.check(drawn, work.reference(changed, predictor=str(work.path), reads=True))


@pytest.mark.parametrize("image", ["whole", "masked"])
def test_an_image_and_a_mask(server, image):
    work = Work(server, image=image)
    drawn = work.sample(*work.predictor(work.file(reading(unet_plan()))))
    work.check(drawn, work.reference(predictor=str(work.path), reads=True))


@pytest.mark.parametrize("image", [None, "masked"])
@pytest.mark.parametrize("high", [80.0, 500.0])
def test_a_predictor_of_a_flow_model(server, image, high):
    """To t = 0.998, where float32 has five digits of 1 - t left. Constants read no middle block, and need no choice `none`."""
    options = {"schedule": "polynomial", "sigma_max": high, "guidance_scale": GUIDANCE}
    plan = make_plan(9, solver="amed", afs=True, **options)
    work = Work(server, "dit", image)
    drawn = work.sample(*work.predictor(work.file(constant(plan))))
    work.check(drawn, work.reference(predictor=str(work.path)))


def test_a_flow_model_with_another_shift_after_our_nodes(server):
    plan = make_plan(4, solver="amed", sigma_max=80.0, guidance_scale=GUIDANCE, afs=False)
    work = Work(server, "dit")
    model, sampler, sigmas = work.predictor(work.file(constant(plan)))
    shifted = work.graph.add("ModelSamplingSD3", model=model, shift=6.0)
    drawn = work.sample(shifted, sampler, sigmas)
    work.check(drawn, work.reference(shifted, predictor=str(work.path)))


def test_a_model_made_a_flow_model_after_our_nodes(server):
    """With the levels of before it is refused; with its own it is sampled as a flow model."""
    plan = unet_plan()
    work = Work(server)
    model, sampler, sigmas = work.predictor(work.file(constant(plan)))
    flow = work.graph.add("ModelSamplingSD3", model=model, shift=3.0)
    work.sample(flow, sampler, sigmas)
    with pytest.raises(Refused, match="connect AMED Schedule with this MODEL"):
        server.run(work.graph)

    work = Work(server)
    loaded = work.file(constant(plan))
    model, sampler, _ = work.predictor(loaded)
    flow = work.graph.add("ModelSamplingSD3", model=model, shift=3.0)
    drawn = work.sample(flow, sampler, work.graph.add("AMEDSchedule", predictor=loaded, model=flow))
    work.check(drawn, work.reference(flow, predictor=str(work.path)))


def solver_node(work, **options):
    options = {"solver": "ipndm", "nfe": 6, "schedule": "polynomial", "afs": "off", "denoise": 1.0, **options}
    node = work.graph.add("AMEDSolver", model=work.model, **options)
    return work.model, node, node[1]


SOLVERS = [("ipndm", 6, "polynomial", "off"), ("deis", 5, "time_uniform", "on"), ("heun", 6, "logsnr", "off")]
SOLVERS += [("dpmpp", 6, "discrete", "off"), ("unipc", 6, "polynomial", "off"), ("dpm", 6, "polynomial", "off")]


@pytest.mark.parametrize(("name", "nfe", "schedule", "afs"), SOLVERS, ids=[row[0] for row in SOLVERS])
def test_a_solver_without_a_predictor(server, name, nfe, schedule, afs):
    work = Work(server)
    drawn = work.sample(*solver_node(work, solver=name, nfe=nfe, schedule=schedule, afs=afs))
    table = {}
    if schedule == "discrete":
        table["alphas_cumprod"] = (1 - BETAS).cumprod(0)
    plan = make_plan(nfe, solver=name, schedule=schedule, sigma_min=LOW, sigma_max=HIGH, afs=afs == "on", **table)
    work.check(drawn, work.reference(plan=plan.to_json()))


def test_a_solver_without_a_predictor_on_a_flow_model(server):
    work = Work(server, "dit")
    drawn = work.sample(*solver_node(work))
    low = 3 * 0.001 / (1 + 2 * 0.001)
    plan = make_plan(6, solver="ipndm", schedule="polynomial", sigma_min=low / (1 - low), sigma_max=80.0, afs=False)
    work.check(drawn, work.reference(plan=plan.to_json()))


def test_denoise_starts_lower_on_the_schedule(server):
    work = Work(server, image="masked")
    drawn = work.sample(*solver_node(work, nfe=3, denoise=0.5))
    levels = make_schedule("polynomial", 7, LOW, HIGH)[-4:]
    plan = make_plan(None, solver="ipndm", schedule=levels, afs=False)
    work.check(drawn, work.reference(plan=plan.to_json()))


def test_denoise_of_none_gives_the_image_back(server):
    work = Work(server, image="whole")
    drawn, kept = work.sample(*solver_node(work, denoise=0.0)), work.save(work.latent)
    latents = server.run(work.graph)
    assert torch.equal(latents[drawn], latents[kept])


def karras(steps):
    return make_schedule("polynomial", steps, LOW, HIGH)


@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("ipndm", "karras"), ("heun", "amed_polynomial"), ("unipc", "karras")]
)
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_ksampler_with_our_solvers(server, sampler, scheduler, denoise):
    """Host levels end at 0: the last evaluation's D. At the whole of it ComfyUI's latents are sqrt(1 + 1/sigma²) larger."""
    work = Work(server, image="masked" if denoise < 1 else None)
    named = {"positive": work.positive, "negative": work.negative, "latent_image": work.latent, "denoise": denoise}
    named |= {"sampler_name": f"amed_{sampler}", "scheduler": scheduler, "seed": SEED, "steps": 4, "cfg": GUIDANCE}
    drawn = work.save(work.graph.add("KSampler", model=work.model, **named))
    levels = karras(4) if denoise == 1 else karras(8)[-4:]
    plan = replace(make_plan(None, solver=sampler, schedule=levels, afs=False), denoise_to_zero=True)
    ratio = (1 + levels[0] ** -2).sqrt().item() if denoise == 1 else 1.0
    work.check(drawn, work.reference(plan=plan.to_json(), ratio=ratio))


@pytest.mark.parametrize("scheduler", ["simple", "amed_time_uniform"])
def test_ksampler_with_our_solvers_on_a_flow_model(server, scheduler):
    """ComfyUI's schedules start at t = 1, where sigma has no end: it is that of the first 0.01 % of the way."""
    work = Work(server, "dit")
    named = {"positive": work.positive, "negative": work.negative, "latent_image": work.latent, "denoise": 1.0}
    named |= {"sampler_name": "amed_euler", "scheduler": scheduler, "seed": SEED, "steps": 5, "cfg": GUIDANCE}
    drawn = work.save(work.graph.add("KSampler", model=work.model, **named))
    if scheduler == "simple":
        u = torch.tensor([1 - 1e-4, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
        t = 3 * u / (1 + 2 * u)
        levels = t / (1 - t)
    else:
        low = 3 * 0.001 / (1 + 2 * 0.001)
        levels = make_schedule("time_uniform", 5, low / (1 - low), 80.0)
    plan = replace(make_plan(None, solver="euler", schedule=levels, afs=False), denoise_to_zero=True)
    ratio = ((1 + levels[0]) / levels[0]).item() if scheduler == "simple" else 1.0
    work.check(drawn, work.reference(plan=plan.to_json(), ratio=ratio))


def test_one_step_of_ksampler_is_one_evaluation(server):
    work = Work(server)
    named = {"positive": work.positive, "negative": work.negative, "latent_image": work.latent, "denoise": 1.0}
    named |= {"scheduler": "karras", "seed": SEED, "steps": 1, "cfg": GUIDANCE}
    ours, theirs = (
        work.save(work.graph.add("KSampler", model=work.model, sampler_name=name, **named))
        for name in ("amed_ipndm", "euler")
    )
    latents = server.run(work.graph)
    assert (latents[ours] - latents[theirs]).abs().max() < 1e-5 * latents[theirs].abs().max()


def test_constants_that_are_written_into_a_node(server):
    work = Work(server)
    text = "0.4, 1.02, 0.99  # first\n\n0.5 1.02 0.99"
    options = {"constants": text, "solver": "amed", "schedule": "polynomial", "afs": "off", "cfg": GUIDANCE}
    drawn = work.sample(*work.predictor(work.graph.add("AMEDConstants", model=work.model, **options)))
    path = server.base / "same.safetensors"
    save_predictor(constant(unet_plan()), path)
    work.check(drawn, work.reference(predictor=str(path)))


def test_a_predictor_that_was_fitted_anew_under_the_same_name(server):
    drawn = []
    for seed in (7, 8):
        work = Work(server)
        node = work.sample(*work.predictor(work.file(reading(unet_plan(), seed=seed), "again.safetensors")))
        drawn.append(server.run(work.graph)[node])
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


def test_the_folders_of_extra_model_paths_are_listed_beside_ours(server):
    save_predictor(constant(unet_plan()), server.base / "models" / "elsewhere" / "far.safetensors")
    save_predictor(constant(unet_plan()), server.base / "models" / "amed" / "near.safetensors")
    (server.base / "models" / "elsewhere" / "notes.txt").write_text("no predictor")
    told = server.get("object_info/AMEDPredictorLoader")["AMEDPredictorLoader"]["input"]["required"]["predictor_name"]
    names = told[0] if isinstance(told[0], list) else told[1]["options"]
    assert {"far.safetensors", "near.safetensors"} <= set(names)
    assert "notes.txt" not in names
    work = Work(server)
    work.path = server.base / "models" / "elsewhere" / "far.safetensors"
    drawn = work.sample(*work.predictor(work.graph.add("AMEDPredictorLoader", predictor_name="far.safetensors")))
    work.check(drawn, work.reference(predictor=str(work.path)))


@pytest.mark.parametrize("kind", ["solver", "predictor"])
def test_cancel_is_heard_before_the_next_evaluation(server, kind):
    """Heun and AMED evaluate twice in a step; ComfyUI itself looks only at the end of one."""
    log = server.base / f"evaluations-{kind}.txt"
    work = Work(server, batch=1)
    loaded = work.file(constant(unet_plan(6)))
    model, sampler, sigmas = work.predictor(loaded) if kind == "predictor" else solver_node(work, solver="heun")
    work.sample(work.graph.add("TestSlow", model=model, log=str(log)), sampler, sigmas)
    queued = server.queue(work.graph)

    def evaluated():
        return len(log.read_text().splitlines()) if log.exists() else 0

    for _ in range(600):
        if evaluated() >= 3:
            break
        time.sleep(0.02)
    server.post("interrupt", {})
    told = server.wait(queued)["status"]["messages"]
    assert "execution_interrupted" in [name for name, _ in told]
    assert evaluated() == 3


def guided(work, kind, model, sampler, sigmas, **named):
    """SamplerCustomAdvanced with a guider of several prompts."""
    guider = work.graph.add(kind, model=model, **named)
    noise = work.graph.add("RandomNoise", noise_seed=SEED)
    named = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": work.latent}
    return work.save(work.graph.add("SamplerCustomAdvanced", **named))


def test_the_cfg_guider_draws_the_same(server):
    work = Work(server)
    model, sampler, sigmas = work.predictor(work.file(reading(unet_plan())))
    conditions = {"positive": work.positive, "negative": work.negative}
    drawn = guided(work, "CFGGuider", model, sampler, sigmas, **conditions, cfg=GUIDANCE)
    work.check(drawn, work.reference(predictor=str(work.path), reads=True))


def dual(work, cfg, server):
    named = {"cond1": work.positive, "cond2": work.negative, "negative": work.negative}
    named |= {"cfg_conds": cfg, "cfg_cond2_negative": cfg}
    told = server.get("object_info/DualCFGGuider")["DualCFGGuider"]["input"]["required"]
    return {**named, **({"style": "regular"} if "style" in told else {})}


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_guider_of_three_prompts_is_refused_before_sampling(server, cfg):
    work = Work(server)
    model, sampler, sigmas = work.predictor(work.file(constant(unet_plan(guidance_scale=None))))
    log = server.base / f"dual-{cfg}.txt"
    slow = work.graph.add("TestSlow", model=model, log=str(log))
    guided(work, "DualCFGGuider", slow, sampler, sigmas, **dual(work, cfg, server))
    with pytest.raises(Refused, match="Guider_DualCFG puts other parts together: use CFG Guider, or AMED Solver"):
        server.run(work.graph)
    assert not log.exists()


def test_a_solver_works_with_a_guider_of_three_prompts(server):
    work = Work(server)
    drawn = guided(work, "DualCFGGuider", *solver_node(work), **dual(work, 3.0, server))
    assert server.run(work.graph)[drawn].isfinite().all()


def wrong(case, work):
    """A graph with one thing wrong, and what is said of it."""
    add, plan = work.graph.add, unet_plan()
    model, sampler, sigmas = work.predictor(work.file(reading(plan), f"{case}.safetensors"))
    if case == "cfg":
        work.sample(model, sampler, sigmas, cfg=7.0)
        return "trained with cfg 2.5, got 7; set cfg to that"
    if case == "split":
        work.sample(model, sampler, add("SplitSigmas", sigmas=sigmas, step=1)[1])
        return "connect those of AMED Schedule, whole and with the MODEL that samples"
    if case == "levels of another":
        work.sample(model, sampler, add("KarrasScheduler", steps=3, sigma_max=10.0, sigma_min=0.1, rho=7.0))
        return "this predictor was trained for 2 steps from noise level 14.6146 to 0.0291672, got SIGMAS of 2 from 10"
    if case == "not our model":
        work.sample(work.model, sampler, sigmas)
        return "connect the MODEL output of AMED Sampler to the sampler or guider"
    if case == "middle block":
        work.sample(*work.predictor(work.file(reading(plan, size=5), "five.safetensors")))
        return "this predictor reads a middle block of 5 x 5, and here it is 4 x 4; set width and height"
    if case == "another range":
        far = make_plan(4, solver="amed", sigma_max=80.0, guidance_scale=GUIDANCE, afs=False)
        work.sample(*work.predictor(work.file(constant(far), "far80.safetensors")))
        return "goes from noise level 80 to 0.002, and this MODEL (not a flow model) knows 14.6146 to 0.0291672"
    if case == "afs":
        work.sample(*solver_node(work, afs="on", denoise=0.5))
        return "set afs to off, or denoise to 1"
    if case == "constants":
        named = {"solver": "amed", "schedule": "polynomial", "afs": "off", "cfg": 1.0}
        work.sample(*work.predictor(add("AMEDConstants", model=work.model, constants="0.5 1\n1.5 1", **named)))
        return "line 2 of constants has r = 1.5, which lies between 0 and 1"
    assert case == "steps"
    work.sample(*solver_node(work, solver="heun", nfe=5))
    return "nfe=5 is not a whole number of intervals; possible are 2, 4, 6"


CASES = [
    "cfg",
    "split",
    "levels of another",
    "not our model",
    "middle block",
    "another range",
    "afs",
    "constants",
    "steps",
]


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_in_a_sentence(server, case):
    work = Work(server)
    expected = wrong(case, work)
    with pytest.raises(Refused) as refused:
        server.run(work.graph)
    assert expected in str(refused.value)


def test_a_model_without_a_middle_block_is_refused_where_one_is_read(server):
    plan = make_plan(4, solver="amed", sigma_max=80.0, guidance_scale=GUIDANCE, afs=False)
    work = Work(server, "dit")
    loaded = work.file(reading(plan))
    work.sample(*work.predictor(loaded))
    with pytest.raises(Refused, match=r"and this MODEL \(\w+\) has none; set bottleneck to none"):
        server.run(work.graph)
    work = Work(server, "dit")
    drawn = work.sample(*work.predictor(work.file(reading(plan)), "none"))
    work.check(drawn, work.reference(predictor=str(work.path)))
