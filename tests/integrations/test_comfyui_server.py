"""Real ComfyUI servers on the CPU, asked over HTTP: what the nodes draw is what Sampler draws with the same network.

COMFYUI names checkouts, separated by colons; COMFYUI_PYTHON the Python that has their requirements and this package, unless it
is the one that runs the tests.
"""

import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from comfyui_client import HERE, Refused, Server, script
from comfyui_work import GUIDANCE, Work, constant, guided, reading, solver_node, unet_plan

from amed_engine import make_plan, save_predictor
from amed_engine.sampling.predictors import ConstantPredictor

NODES = ("AMEDPredictorLoader", "AMEDSchedule", "AMEDSampler", "AMEDSolver", "AMEDConstants")
NODES_ALONE = "from amed_engine.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS"


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


@pytest.mark.parametrize("later", ["FreeU", "ModelSamplingDiscrete", "PerturbedAttentionGuidance"])
def test_nodes_after_ours_do_not_disturb_what_is_heard(server, later):
    """FreeU writes to what the middle block gave; each node clones the patches of the one before; the last asks twice."""
    options = {"FreeU": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}, "PerturbedAttentionGuidance": {"scale": 1e-7}}
    options = options.get(later, {"sampling": "v_prediction", "zsnr": False})
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


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_denoise_leaves_the_last_steps_of_a_predictor(server, kind):
    work, options = Work(server, kind, "masked"), {"sigma_min": 0.002, "sigma_max": 80.0} if kind == "dit" else {}
    plan = unet_plan(6, **options)
    predictor = reading(plan) if kind == "unet" else constant(plan)
    drawn = work.sample(*work.predictor(work.file(predictor), denoise=0.67))
    path = server.base / "last.safetensors"
    if kind == "dit":
        predictor = ConstantPredictor.of(predictor.choices()[1:])
    predictor.plan = replace(plan, sigmas=plan.sigmas[1:], schedule="custom")
    save_predictor(predictor, path)
    work.check(drawn, work.reference(predictor=str(path), reads=kind == "unet"))


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


def test_the_stand_in_of_the_other_tests_is_called_as_comfyui_is(server):
    support = Path(__file__).parents[1] / "support"
    command = script(server.checkout, HERE / "signatures.py", support)
    told = subprocess.run(command, check=True, env=server.environment, capture_output=True, text=True).stdout
    assert told.partition("differs:")[2].split() == []


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


def test_the_cfg_guider_draws_the_same(server):
    work = Work(server)
    model, sampler, sigmas = work.predictor(work.file(reading(unet_plan())))
    conditions = {"positive": work.positive, "negative": work.negative}
    drawn = guided(work, "CFGGuider", model, sampler, sigmas, **conditions, cfg=GUIDANCE)
    work.check(drawn, work.reference(predictor=str(work.path), reads=True))


def test_the_nodes_alone_by_the_protocol_of_before(server, tmp_path):
    old = Server(server.checkout, tmp_path, NODES_ALONE)
    try:
        told = {name: old.get(f"object_info/{name}")[name] for name in NODES}
        assert all(node["description"] and all(node["output_tooltips"]) for node in told.values())
        drawn = []
        for seed in (7, 8):
            work = Work(old)
            node = work.sample(*work.predictor(work.file(reading(unet_plan(), seed=seed))))
            drawn.append(work.check(node, work.reference(predictor=str(work.path), reads=True)))
        assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    finally:
        old.stop()
