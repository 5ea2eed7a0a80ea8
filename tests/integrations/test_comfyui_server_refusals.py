"""What does not fit together is refused by real ComfyUI servers, in a sentence and before sampling."""

import pytest
from comfyui_client import Refused
from comfyui_work import GUIDANCE, Work, constant, dual, guided, reading, solver_node, unet_plan

from amed_engine import make_plan


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
        work.sample(model, sampler, add("SplitSigmas", sigmas=sigmas, step=1)[0])
        return "connect those of AMED Schedule, with the MODEL that samples"
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
