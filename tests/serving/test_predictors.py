"""An engine's own predictors: what a user fitted to a model draws what requests leave open, as bundled ones do."""

import logging
import threading
from dataclasses import replace

import mixed
import pytest
import torch
from engines import PATIENCE

from amed_engine import ConfigError, ContinuousSampler, FileFormatError, Sampler, save_predictor
from amed_engine.checkpoints import save_model
from amed_engine.zoo import bundled_predictor, load

NFES = (3, 5, 8)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A model that is nobody's by name, and predictors for it: the bundled ones, as files."""
    folder = tmp_path_factory.mktemp("copied")
    save_model(load("digits"), folder / "mine.safetensors")
    for nfe in NFES:
        save_predictor(bundled_predictor("digits", nfe), folder / f"nfe{nfe}.safetensors")
    return folder


def files(folder, *nfes):
    return [folder / f"nfe{nfe}.safetensors" for nfe in nfes]


@pytest.fixture(scope="module")
def mine(copied):
    with ContinuousSampler(copied / "mine.safetensors", rows=4, predictors=files(copied, 8, 3, 5)) as engine:
        yield engine


def same(result, sampler, **options):
    expected = sampler.run([1, 2], 3, **options)
    assert (result.plan, result.backend) == (expected.plan, "ticks")
    torch.testing.assert_close(result.images, expected.images, rtol=0, atol=2e-5 * float(expected.images.abs().max()))


@pytest.mark.parametrize(("asked", "nfe"), [(3, 3), (5, 5), (8, 8), (None, 5)])
def test_what_names_nothing_but_an_nfe_is_drawn_by_the_predictor_for_it(mine, copied, asked, nfe):
    sampler = Sampler(copied / "mine.safetensors", copied / f"nfe{nfe}.safetensors")
    same(mine.submit([1, 2], 3, nfe=asked).result(PATIENCE), sampler)


OTHERS = {
    "another NFE": {"nfe": 6},
    "none": {"predictor": "none", "nfe": 5},
    "a solver": {"solver": "ipndm", "nfe": 5},
    "a schedule": {"schedule": "logsnr"},
    "a first step": {"afs": False},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_names_more_is_drawn_as_of_a_model_without(mine, copied, name):
    same(mine.submit([1, 2], 3, **OTHERS[name]).result(PATIENCE), Sampler(copied / "mine.safetensors", **OTHERS[name]))


def test_a_request_s_own_predictor_and_its_plan_go_first(mine, copied):
    other = bundled_predictor("digits", 4)
    same(mine.submit([1, 2], 3, predictor=other).result(PATIENCE), Sampler(copied / "mine.safetensors", other))
    (five,) = files(copied, 5)
    sampler = Sampler(copied / "mine.safetensors", five)
    same(mine.submit([1, 2], 3, plan=bundled_predictor("digits", 5).plan).result(PATIENCE), sampler)
    with pytest.raises(ConfigError, match="this plan needs a predictor"):
        mine.submit([1], plan=other.plan)


@pytest.mark.parametrize("nfe", [5.0, True, [5], "5", 0])
def test_what_is_no_nfe_is_still_none(mine, nfe):
    with pytest.raises(ConfigError, match="nfe must be a positive integer"):
        mine.submit([1], nfe=nfe)


def test_without_one_for_five_the_first_draws_and_what_steps_in_costs_as_much(copied, caplog):
    with ContinuousSampler(copied / "mine.safetensors", rows=2, predictors=files(copied, 8, 3)) as engine:
        assert engine.submit([1]).result(PATIENCE).plan == bundled_predictor("digits", 8).plan
        with caplog.at_level(logging.WARNING, logger="amed_engine"):
            results = [engine.submit([1, 2], 3, guidance_scale=2.0).result(PATIENCE) for _ in range(2)]
        told = [record.message for record in caplog.records if "guidance_scale" in record.message]
        assert told == [
            f"the model's own predictor is not for guidance_scale=2.0: sampling with {results[0].plan.describe()}"
        ]
        same(results[1], Sampler(copied / "mine.safetensors", nfe=8), guidance_scale=2.0)


def with_plan(predictor, guidance=None, nfe=6):
    said = {"solver": "amed", "nfe": nfe, "afs": False, "schedule": "polynomial"}
    predictor.plan = mixed.plan_of(said, {}, midpoint=True, guidance_scale=guidance)
    return predictor


def test_one_that_was_trained_under_guidance_is_for_that():
    model, own = mixed.Classes(), with_plan(mixed.learned(1), guidance=2.0)
    with ContinuousSampler(model, rows=2, predictors=[own], verify=False) as engine:
        guided = engine.submit([1, 2], 3, nfe=6, guidance_scale=2.0).result(PATIENCE)
        same(guided, Sampler(model, own, verify=False), guidance_scale=2.0)
        same(engine.submit([1, 2], 3, nfe=6).result(PATIENCE), Sampler(model, nfe=6, verify=False))


def test_they_stand_in_the_place_of_bundled_ones(copied):
    with ContinuousSampler("digits", rows=2, predictors=files(copied, 3)) as engine:
        assert list(engine.model.predictors) == [3]
        same(engine.submit([1, 2], 3, nfe=5).result(PATIENCE), Sampler("digits", "none", nfe=5))
    with ContinuousSampler("digits", rows=2) as engine:
        assert list(engine.model.predictors) == [3, 4, 5, 6, 7, 8, 9, 10]


def test_a_predictor_that_its_caller_goes_on_training_stays_as_it_was_given():
    model, own = mixed.Classes(), with_plan(mixed.learned(1))
    with ContinuousSampler(model, rows=2, predictors=[own], verify=False) as engine:
        expected = Sampler(model, own, verify=False)
        with torch.no_grad():
            own.fc_r.bias.add_(1.0)
        same(engine.submit([1, 2], 3).result(PATIENCE), expected)


def test_a_warm_engine_has_its_programs(copied):
    with ContinuousSampler(copied / "mine.safetensors", rows=2, predictors=files(copied, 3, 5)) as engine:
        assert engine.warmup().backend == "eager"
        programs = engine._orders.programs
        made = set(programs._prepared), set(programs._tables)
        for nfe in (None, 3, 5):
            for scale in (None, 2.0):
                assert engine.submit([1], nfe=nfe, guidance_scale=scale).result(PATIENCE).images.isfinite().all()
        assert (set(programs._prepared), set(programs._tables)) == made


def two_of_one_nfe(folder):
    return {
        "predictors": [*files(folder, 5), bundled_predictor("digits", 5)]
    }, r"nfe5.safetensors and predictors\[1\] are both"


def without_plan(folder):
    save_predictor(mixed.learned(1), folder / "planless.safetensors")
    return {"predictors": [folder / "planless.safetensors"]}, "planless.safetensors has no plan"


def of_another_model(folder):
    save_predictor(with_plan(mixed.learned(1)), folder / "other.safetensors")
    return {
        "predictors": [*files(folder, 3), str(folder / "other.safetensors")]
    }, "other.safetensors: .* bottlenecks of 2x2"


def damaged(folder):
    whole = files(folder, 3)[0].read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    return {"predictors": [folder / "cut.safetensors"]}, "cut.safetensors"


def of_another_precision(folder):
    predictor = bundled_predictor("digits", 3)
    predictor.plan = replace(predictor.plan, dtype="float32")
    save_predictor(predictor, folder / "float32.safetensors")
    options = {"predictors": [folder / "float32.safetensors"], "autocast": torch.bfloat16}
    return options, "float32.safetensors: .*leave autocast=torch.bfloat16 out"


REFUSED = {
    "two of one NFE": two_of_one_nfe,
    "no plan": without_plan,
    "another model's": of_another_model,
    "damaged": damaged,
    "no file": lambda folder: ({"predictors": [folder / "nowhere.safetensors"]}, "nowhere.safetensors"),
    "one text": lambda folder: ({"predictors": str(files(folder, 3)[0])}, "predictors must be a list of files"),
    "one predictor": lambda folder: (
        {"predictors": bundled_predictor("digits", 3)},
        "predictors must be a list of files",
    ),
    "no predictor": lambda folder: ({"predictors": [3]}, "predictor must be one of this package"),
    "levels": lambda folder: ({"predictors": files(folder, 3), "sigma_max": 40.0}, "got sigma_max=40.0 as well"),
    "another precision": of_another_precision,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_draw_is_refused_before_an_engine_starts(copied, name):
    options, message = REFUSED[name](copied)
    before = threading.active_count()
    with pytest.raises((ConfigError, FileFormatError), match=message):
        ContinuousSampler(copied / "mine.safetensors", rows=2, **options)
    assert threading.active_count() == before
