"""Solvers that need no predictor on real ComfyUI servers: the node, and entries in the lists of KSampler."""

from dataclasses import replace

import pytest
import torch
from comfyui_work import BETAS, GUIDANCE, HIGH, LOW, SEED, Work, solver_node

from amed_engine import make_plan, make_schedule

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
