"""What the nodes are declared as, what they list and read, and what they refuse; under the stand-in of ComfyUI."""

import inspect
import sys
from dataclasses import replace

import pytest
import torch
from comfy_standin import CONST, EPS, GUIDANCE, CFGGuider, ModelPatcher, ModelSamplingDiscrete

from amed_engine import ConfigError, Sampler, make_plan, make_schedule, save_predictor
from amed_engine.errors import MissingDependency
from amed_engine.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from amed_engine.integrations.comfyui.constants import read
from amed_engine.integrations.comfyui.features import ConditionalFeatures
from amed_engine.integrations.comfyui.training_free import register
from amed_engine.sampling.predictors import ConstantPredictor


def node(name, *arguments, **named):
    made = NODE_CLASS_MAPPINGS[name]()
    return getattr(made, made.FUNCTION)(*arguments, **named)


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


def test_features_keep_no_more_than_one_evaluation():
    """The patched model may be run by any other sampler, which takes nothing; patches that follow may write to h."""
    features = ConditionalFeatures()
    for _ in range(5):
        h, skip = torch.ones(4, 1, 2, 2), torch.zeros(4, 1, 2, 2)
        options = {"cond_or_uncond": [1, 0], "sigmas": torch.ones(2), "block": ("output", 0)}
        assert features.output_patch(h, skip, options) == (h, skip)
        features.output_patch(skip, skip, {**options, "block": ("output", 1)})
        h.zero_()
    assert len(features._parts) == 1
    assert torch.equal(features.take(), torch.ones(2, 1, 2, 2))
    assert features.take() is None


def test_a_prompt_that_is_asked_again_counts_as_it_was_first():
    """As perturbed attention does; two prompts at once are averaged, and the next evaluation is another."""
    features = ConditionalFeatures()
    for start in (0.0, 8.0):
        options = {"sigmas": torch.ones(1), "block": ("output", 0)}
        for flags, uuids, value in (([1, 0], ["n", "p"], 1.0), ([0], ["q"], 3.0), ([0], ["p"], 50.0)):
            h = torch.full((len(flags), 1, 1, 1), start + value)
            features.output_patch(h, h, {**options, "cond_or_uncond": flags, "uuids": uuids})
        assert features.take().item() == start + 2


def test_the_loader_lists_and_loads_what_is_in_the_models_folder(comfy, predictor):
    loader = NODE_CLASS_MAPPINGS["AMEDPredictorLoader"]
    save_predictor(predictor, comfy / "amed" / "five.safetensors")
    (comfy / "amed" / "notes.txt").write_text("no predictor")
    assert loader.INPUT_TYPES()["required"]["predictor_name"][0] == ["five.safetensors"]
    (loaded,) = loader().load("five.safetensors")
    assert loaded.plan == predictor.plan
    with pytest.raises(ConfigError, match="no predictor 'six'"):
        loader().load("six")
    before = loader.IS_CHANGED("five.safetensors")
    assert loader.IS_CHANGED("five.safetensors") == before
    predictor.plan = replace(predictor.plan, guidance_scale=GUIDANCE)
    save_predictor(predictor, comfy / "amed" / "five.safetensors")
    assert loader.IS_CHANGED("five.safetensors") != before


def test_folders_of_extra_model_paths_stay(comfy, predictor):
    """They are there before ours, with no suffixes."""
    (comfy / "elsewhere").mkdir()
    save_predictor(predictor, comfy / "elsewhere" / "far.safetensors")
    (comfy / "elsewhere" / "notes.txt").write_text("no predictor")
    save_predictor(predictor, comfy / "amed" / "near.safetensors")
    sys.modules["folder_paths"].add_model_folder_path("amed", str(comfy / "elsewhere"))
    listed = NODE_CLASS_MAPPINGS["AMEDPredictorLoader"].INPUT_TYPES()["required"]["predictor_name"][0]
    assert listed == ["far.safetensors", "near.safetensors"]


def test_nodes_are_declared_as_comfyui_reads_them(comfy):
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for kind in NODE_CLASS_MAPPINGS.values():
        sockets = {**kind.INPUT_TYPES()["required"], **kind.INPUT_TYPES().get("optional", {})}
        assert list(inspect.signature(getattr(kind(), kind.FUNCTION)).parameters) == list(sockets)
        assert all(options["tooltip"].endswith(".") for _, options in sockets.values())
        assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES) == len(kind.OUTPUT_TOOLTIPS)
        assert kind.CATEGORY
        assert kind.DESCRIPTION


def test_outside_comfyui_the_nodes_say_so():
    with pytest.raises(MissingDependency, match="run inside ComfyUI"):
        NODE_CLASS_MAPPINGS["AMEDPredictorLoader"].INPUT_TYPES()


def test_a_predictor_without_levels_is_refused(comfy, predictor):
    predictor.plan = None
    with pytest.raises(ConfigError, match="save it with its plan"):
        node("AMEDSchedule", predictor)


@pytest.mark.parametrize("sampling", [EPS, CONST])
def test_denoise_leaves_the_last_steps_of_a_predictor(comfy, tiny_conditional, predictor, latents, sampling):
    """A third of three, or a half of two: the last interval, without an analytic step before it."""

    def flow(x, t, labels):
        rest = (1 - t.double()).reshape(-1, 1, 1, 1)
        return tiny_conditional((x / rest).float(), (t.double() / (1 - t.double())).float(), labels)

    plan = predictor.plan = replace(predictor.plan, guidance_scale=GUIDANCE)
    patcher = ModelPatcher(flow if sampling is CONST else tiny_conditional, sampling)
    model, sampler = node("AMEDSampler", patcher, predictor)
    (sigmas,) = node("AMEDSchedule", predictor, patcher, 0.33 if plan.intervals == 3 else 0.5)
    assert len(sigmas) == 2
    drawn = sample(model, sampler, sigmas, latents)
    predictor.plan = replace(plan, sigmas=plan.sigmas[-2:], schedule="custom", rho=None, afs=False)
    wanted = {"class_labels": [3, 1, 4], "guidance_scale": GUIDANCE}
    expected = Sampler(tiny_conditional, predictor).run(latents, **wanted).images
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_denoise_between_two_steps_is_refused(comfy, predictor):
    predictor.plan = make_plan(6, solver="amed", afs=False)
    with pytest.raises(ConfigError, match=r"has 3 steps, so denoise is one of 0\.33, 0\.67, 1; got 0\.5"):
        node("AMEDSchedule", predictor, None, 0.5)
    with pytest.raises(ConfigError, match="has 3 steps, so denoise is one of"):
        node("AMEDSchedule", predictor, None, 0.0)


def test_steps_that_build_on_those_before_are_not_cut(comfy, tiny_conditional, latents):
    predictor = ConstantPredictor(3)
    predictor.plan = make_plan(6, solver="ipndm", midpoint=True, afs=False, guidance_scale=GUIDANCE)
    with pytest.raises(ConfigError, match=r"build on those before, got denoise 0\.67; set denoise to 1"):
        node("AMEDSchedule", predictor, None, 0.67)
    model, sampler = node("AMEDSampler", ModelPatcher(tiny_conditional), predictor)
    (sigmas,) = node("AMEDSchedule", predictor)
    with pytest.raises(ConfigError, match=r"was trained for 3 steps from noise level 80 to 0\.002, got SIGMAS of 2"):
        sample(model, sampler, sigmas[1:], latents)


def asked(**options):
    return {"solver": "ipndm", "nfe": 6, "schedule": "polynomial", "afs": "off", "denoise": 1.0, **options}


def sample(patcher, sampler, sigmas, latents):
    steps = []
    guider, image = CFGGuider(patcher), torch.zeros_like(latents)
    drawn = guider.sample(latents, image, sampler, sigmas, None, lambda *step: steps.append(step[0]), True)
    assert steps == list(range(len(sigmas) - 1))
    return drawn


@pytest.mark.parametrize("zero", [False, True])
def test_a_solver_works_off_whatever_levels_are_connected(comfy, tiny_conditional, latents, zero):
    """With a last level 0 the last evaluation's D is the result."""
    sampler, _ = node("AMEDSolver", ModelPatcher(tiny_conditional), **asked())
    levels = make_schedule("logsnr", 5, 0.01, 80.0)
    plan = replace(make_plan(None, solver="ipndm", schedule=levels, afs=False), denoise_to_zero=zero)
    plan = replace(plan, guidance_scale=GUIDANCE)
    wanted = {"class_labels": [3, 1, 4], "guidance_scale": GUIDANCE}
    expected = Sampler(tiny_conditional, plan=plan).run(latents, **wanted).images
    sigmas = torch.cat([levels, torch.zeros(int(zero))]).float()
    drawn = sample(ModelPatcher(tiny_conditional), sampler, sigmas, latents)
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_levels_that_rise_are_refused_and_repeated_ones_are_one(comfy, tiny_conditional, latents):
    sampler, sigmas = node("AMEDSolver", ModelPatcher(tiny_conditional), **asked())
    with pytest.raises(ConfigError, match=r"SIGMAS must fall from step to step, got .* without Flip Sigmas"):
        sample(ModelPatcher(tiny_conditional), sampler, sigmas.flip(0), latents)
    once = sample(ModelPatcher(tiny_conditional), sampler, sigmas[2:], latents)
    guider, twice = CFGGuider(ModelPatcher(tiny_conditional)), torch.cat([sigmas[2:3], sigmas[2:]])
    drawn = guider.sample(latents, torch.zeros_like(latents), sampler, twice, None, lambda *step: None, True)
    assert torch.equal(drawn, once)


@pytest.mark.parametrize("sampling", [EPS, CONST])
def test_a_plan_that_ends_at_0_says_so_in_its_levels(comfy, tiny_conditional, predictor, latents, sampling):
    """Without the 0 a flow model's latents are asked for at the last level, and are the same."""
    predictor.plan = replace(predictor.plan, denoise_to_zero=True, guidance_scale=GUIDANCE)

    def flow(x, t, labels):
        rest = (1 - t.double()).reshape(-1, 1, 1, 1)
        return tiny_conditional((x / rest).float(), (t.double() / (1 - t.double())).float(), labels)

    patcher = ModelPatcher(flow if sampling is CONST else tiny_conditional, sampling)
    model, sampler = node("AMEDSampler", patcher, predictor)
    (sigmas,) = node("AMEDSchedule", predictor, patcher)
    assert sigmas[-1] == 0
    assert len(sigmas) == predictor.plan.intervals + 2
    whole, cut = sample(model, sampler, sigmas, latents), sample(model, sampler, sigmas[:-1], latents)
    assert (whole - cut).abs().max() < 1e-6 * whole.abs().max()


def test_an_analytic_first_step_keeps_its_own_levels(comfy, tiny_conditional, latents):
    sampler, sigmas = node("AMEDSolver", ModelPatcher(tiny_conditional), **asked(afs="on"))
    assert len(sigmas) == 8
    with pytest.raises(ConfigError, match="connect the SIGMAS of AMED Solver, or set afs to off"):
        sample(ModelPatcher(tiny_conditional), sampler, sigmas[1:], latents)


REFUSED = [
    ({"denoise": 1.5}, "denoise must lie between 0 and 1, got 1.5"),
    ({"afs": "on", "denoise": 0.5}, "set afs to off, or denoise to 1"),
    ({"afs": "maybe"}, "afs must be off or on, got 'maybe'"),
    ({"schedule": "discrete"}, "this MODEL has none; choose polynomial, time_uniform or logsnr"),
    ({"solver": "heun", "nfe": 5}, "nfe=5 is not a whole number of intervals"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_wrong_widgets_are_refused(comfy, tiny_conditional, wrong, message):
    with pytest.raises(ConfigError, match=message):
        node("AMEDSolver", ModelPatcher(tiny_conditional), **asked(**wrong))


def test_the_table_of_a_model_is_read(comfy, tiny_conditional):
    _, sigmas = node("AMEDSolver", ModelPatcher(tiny_conditional, ModelSamplingDiscrete), **asked(schedule="discrete"))
    assert sigmas.tolist()[::6] == pytest.approx([80.0, 0.002])


TEXTS = [
    ("", "constants has no line"),
    ("0.5 1 1 1", "expected up to 3 positive numbers"),
    ("0.5\nhalf 1", "line 2 of constants is 'half 1', which holds no number"),
    ("0.5 -1", "expected up to 3 positive numbers"),
    ("nan", "expected up to 3 positive numbers"),
    ("0.5\n" * 16, "constants has 16 lines, expected up to 15"),
    ("1 1 1", "line 1 of constants has r = 1, which lies between 0 and 1"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_constants_that_are_none_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_constants_bring_a_plan_over_the_model_s_range(comfy, tiny_conditional):
    options = {"solver": "ipndm", "schedule": "logsnr", "afs": "on", "cfg": 7.0}
    (predictor,) = node("AMEDConstants", ModelPatcher(tiny_conditional), constants="0.5\n0.4, 1.01 # two", **options)
    assert predictor.r.tolist() == [[0.5], [0.4]]
    assert predictor.scale_dir.tolist() == [[1.0], [1.01]]
    plan = predictor.plan
    assert (plan.solver, plan.nfe, plan.afs, plan.guidance_scale) == ("ipndm", 3, True, 7.0)
    assert (plan.sigmas[0], plan.sigmas[-1]) == pytest.approx((80.0, 0.002))


def test_the_lists_of_ksampler_grow_once(comfy):
    register()
    register()
    samplers = sys.modules["comfy.samplers"]
    assert samplers.KSampler.SAMPLERS[:2] == ["euler", "ddim"]
    assert samplers.KSampler.SAMPLERS.count("amed_ipndm") == samplers.KSAMPLER_NAMES.count("amed_ipndm") == 1
    assert callable(sys.modules["comfy.k_diffusion.sampling"].sample_amed_ipndm)
    assert "amed_consistency" not in samplers.KSAMPLER_NAMES  # no solver of the ODE
    assert samplers.SCHEDULER_NAMES == ["amed_polynomial", "amed_time_uniform", "amed_logsnr"]


@pytest.mark.parametrize("sampling", [EPS, CONST])
@pytest.mark.parametrize("steps", [1, 4])
def test_our_schedules_end_at_0(comfy, sampling, steps):
    """A flow model's starts at sigma 80, not at t = 1."""
    register()
    handler = sys.modules["comfy.samplers"].SCHEDULER_HANDLERS["amed_polynomial"]
    sigmas = handler.handler(sampling(), steps)
    assert handler.use_ms
    assert len(sigmas) == steps + 1
    assert sigmas[0] == pytest.approx(80.0 if sampling is EPS else 80 / 81)
    assert sigmas[-1] == 0
