"""What a plan records of the model it is for: where a predictor is refused, the message says what differs, and what it does
not read may differ."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from amed_engine import AMEDPredictor, Plan, Sampler, fit, load_predictor, make_plan, save_predictor
from amed_engine.adapters import ClassifierFree, Thresholded, alphas_cumprod, wrap
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.engine.resolve import resolve
from amed_engine.errors import ConfigError
from amed_engine.sampling.predictors import ConstantPredictor
from amed_engine.training.presets import made_for

QUICK = {"nfe": 3, "samples": 8, "starts": 1, "early": 0, "late": 1, "teacher_nfe": 6, "progress": False}
BOTTLENECKS = (None, "auto", "first", "middle_block.0")


def recorded(denoiser, **changes) -> Plan:
    plan = make_plan(3, solver="amed", sigma_min=0.1, sigma_max=10.0)
    return replace(made_for(resolve(denoiser), plan), **changes)


def constant_for(denoiser, **changes) -> ConstantPredictor:
    predictor = ConstantPredictor(2)
    predictor.plan = recorded(denoiser, **changes)
    return predictor


def reading(denoiser) -> AMEDPredictor:
    predictor = AMEDPredictor(bottleneck=(4, 4))
    predictor.plan = recorded(denoiser)
    return predictor


def refusal(denoiser, predictor) -> str:
    with pytest.raises(ConfigError, match=r"another wrapping of it\): the fingerprints differ; ") as raised:
        Sampler(denoiser, predictor)
    return str(raised.value)


# ---- what is not read


@pytest.mark.parametrize("trained", BOTTLENECKS)
def test_what_reads_no_bottleneck_goes_with_any(make_unet, tmp_path, trained):
    save_predictor(constant_for(wrap(make_unet(), "epsilon", bottleneck=trained)), tmp_path / "p.safetensors")
    predictor = load_predictor(tmp_path / "p.safetensors")
    for bottleneck in BOTTLENECKS:
        assert Sampler(wrap(make_unet(), "epsilon", bottleneck=bottleneck), predictor).nfe == 3
        guided = Thresholded(wrap(make_unet(), "epsilon", bottleneck=bottleneck))
        assert "Thresholded (only here)" in refusal(guided, predictor)
    assert "prediction" in refusal(wrap(make_unet(), "v", bottleneck=None, verify=False), predictor)


def test_a_fit_and_its_mean_answer_go_with_any_bottleneck(make_unet, tmp_path):
    for trained in ("first", "auto"):
        predictor = fit(wrap(make_unet(), "epsilon", bottleneck=trained), afs="mean", **QUICK)
        assert predictor.plan.mean is not None
        save_predictor(predictor, tmp_path / "p.safetensors")
        for bottleneck in BOTTLENECKS:
            sampler = Sampler(wrap(make_unet(), "epsilon", bottleneck=bottleneck), tmp_path / "p.safetensors")
            assert sampler.run(1).images.isfinite().all()


def test_a_recipe_goes_with_any_bottleneck(make_unet):
    model = resolve(wrap(make_unet(), "epsilon", bottleneck="first"))
    plan = made_for(model, make_plan(3, solver="euler", sigma_min=0.1, sigma_max=10.0))
    for bottleneck in BOTTLENECKS:
        assert Sampler(wrap(make_unet(), "epsilon", bottleneck=bottleneck), plan=plan).nfe == 3
    with pytest.raises(ConfigError, match=r"this plan was made for another model.*what differs: .*prediction"):
        Sampler(wrap(make_unet(), "v", verify=False), plan=plan)


def test_guidance_round_another_bottleneck_is_the_same(make_unet):
    def guided(bottleneck, scale=2.0):
        return ClassifierFree(wrap(make_unet(), "epsilon", label_dim=3, null_class=3, bottleneck=bottleneck), scale)

    predictor = constant_for(guided("first"))
    assert Sampler(guided(None), predictor).nfe == 3
    assert "scale (2.0 then, 3.0 here)" in refusal(guided(None, 3.0), predictor)


def test_what_reads_the_bottleneck_is_for_that_one(make_unet):
    predictor = reading(wrap(make_unet(), "epsilon", bottleneck="first"))
    assert "what differs: bottleneck ('first' then, 'middle_block' here); wrap the network as it was then" in refusal(
        wrap(make_unet(), "epsilon"), predictor
    )
    adaptive = fit(wrap(make_unet(), "epsilon"), variant="adaptive", codes=2, **QUICK)
    assert adaptive.reads_bottleneck
    assert "bottleneck ('middle_block' then, None here)" in refusal(
        wrap(make_unet(), "epsilon", bottleneck=None), adaptive
    )


def test_files_without_a_record_go_with_the_bottlenecks_that_are_tried(make_unet):
    """Of earlier versions: none, and the one that is found."""
    for trained in (None, "auto"):
        predictor = constant_for(wrap(make_unet(), "epsilon", bottleneck=trained), wrapping=None)
        for bottleneck in BOTTLENECKS:
            assert Sampler(wrap(make_unet(), "epsilon", bottleneck=bottleneck), predictor).nfe == 3
    told = refusal(wrap(make_unet(), "v", verify=False), predictor)
    assert "what differs is not known: it was written by an earlier version" in told


# ---- what differs


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda unet: wrap(unet, "v", verify=False), "prediction ('epsilon' then, 'v' here)"),
        (lambda unet: wrap(unet, "edm"), "prediction ('epsilon' then, 'EDM' here)"),
        (
            lambda unet: wrap(unet, "epsilon", betas="cosine"),
            "betas (1000 levels from 1.00e-02 to 1.57e+02 then, 1000 levels",
        ),
        (lambda unet: wrap(unet, "epsilon", betas=alphas_cumprod("linear", 500)), "betas (1000 levels from"),
        (lambda unet: wrap(unet, "epsilon", label_dim=3, null_class=3), "null_class (None then, 3 here)"),
        (lambda unet: Thresholded(wrap(unet, "epsilon")), "Thresholded (only here)"),
    ],
)
def test_a_setting_that_differs_is_named(make_unet, other, said):
    told = refusal(other(make_unet()), reading(wrap(make_unet(), "epsilon")))
    assert said in told
    assert "; wrap the network as it was then; pass its own predictor" in told
    assert "the weights" not in told


def test_weights_that_differ_are_named_beside_the_settings(make_unet):
    predictor = reading(wrap(make_unet(), "epsilon"))
    other = copy.deepcopy(make_unet())
    next(other.parameters()).view(-1)[0] += 1
    assert "what differs: the weights; pass its own" in refusal(wrap(other, "epsilon"), predictor)
    told = refusal(Thresholded(wrap(other, "v", verify=False)), predictor)
    assert (
        "what differs: the weights, Thresholded (only here), prediction ('epsilon' then, 'v' here); pass its own"
        in told
    )


def test_networks_without_a_wrapper_differ_in_their_weights(tiny_model):
    predictor = reading(tiny_model)
    assert json.loads(predictor.plan.wrapping) == {}
    assert "what differs: Thresholded (only here); wrap" in refusal(Thresholded(tiny_model), predictor)
    with torch.no_grad():
        next(tiny_model.parameters()).view(-1)[0] += 1
    assert "what differs: the weights; " in refusal(tiny_model, predictor)


def test_a_traced_model_tells_its_settings_and_an_exported_one_none(make_unet):
    inputs = torch.zeros(2, 1, 8, 8), torch.ones(2)
    predictor = reading(wrap(make_unet(), "epsilon", betas="cosine"))
    denoiser = wrap(make_unet(), "epsilon")
    exported = torch.export.export(denoiser, inputs).module()
    assert "what differs is not known: the model is exported" in refusal(exported, predictor)


# ---- files


def test_the_record_travels_with_the_plan(make_unet, tmp_path):
    denoiser = wrap(make_unet(), "epsilon", bottleneck="first")
    plan = recorded(denoiser)
    assert plan.model == fingerprint(denoiser)
    written = plan.to_json()
    assert written["wrapping"][""]["bottleneck"] == "first"
    assert Plan.from_json(json.loads(json.dumps(written))) == plan
    del written["wrapping"]
    assert Plan.from_json(written) == replace(plan, wrapping=None)
    assert "wrapping" not in replace(plan, wrapping=None).to_json()
    for bad in ([], "x", {"": 3}):
        with pytest.raises(ConfigError, match="plan entry 'wrapping'"):
            Plan.from_json({**written, "wrapping": bad})
    for odd in ({"": {}}, {"": {"bottleneck": [1]}}, {"x": {"kind": {"a": 1}, "sigmas": [], "labels": "y" * 999}}):
        predictor = reading(denoiser)
        predictor.plan = Plan.from_json({**written, "wrapping": odd, "model": "0" * 64})
        assert len(refusal(denoiser, predictor)) < 600
