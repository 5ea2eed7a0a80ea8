"""Programs are made once for each value of what was asked for, and are bounded."""

from concurrent.futures import ThreadPoolExecutor

import mixed
import torch
from engines import PATIENCE, SAID

from amed_engine import (
    Sampler,
    save_predictor,
)
from amed_engine.serving.programs import KEPT


def programs(engine):
    return engine._orders.programs


def tables(engine):
    return {id(made.table) for made in programs(engine)._tables.values()}


def test_programs_of_equal_value_are_one(engine, tmp_path):
    predictors = [mixed.learned(1), mixed.learned(1)]
    said = {"solver": "amed", "nfe": 4, "afs": False, "schedule": "polynomial"}
    for predictor in predictors:
        predictor.plan = mixed.plan_of(said, {}, midpoint=True)
    save_predictor(predictors[0], tmp_path / "mine.safetensors")
    forms = [*predictors, tmp_path / "mine.safetensors", str(tmp_path / "mine.safetensors")]
    drawn = [engine.submit([1], 0, predictor=form).result(PATIENCE).images for form in forms]
    assert len(tables(engine)) == len(programs(engine)._prepared) == 1
    assert all(torch.equal(images, drawn[0]) for images in drawn)


def test_plans_and_levels_of_equal_value_are_one(engine, tmp_path):
    plan = mixed.plan_of({"solver": "ipndm", "nfe": 3, "afs": False, "schedule": "polynomial"}, {})
    plan.save(tmp_path / "plan.json")
    for form in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        engine.submit([1], plan=form).result(PATIENCE)
    assert len(tables(engine)) == 1
    for levels in (torch.tensor([8.0, 4.0, 1.0]), torch.tensor([8.0, 4.0, 1.0])):
        engine.submit([1], solver="euler", schedule=levels, solver_options={}).result(PATIENCE)
    assert len(tables(engine)) == 2


DIFFERENT = [
    {"solver": "ipndm", "nfe": 3},
    {"solver": "ipndm", "nfe": 4},
    {"solver": "ipndm", "nfe": 3, "afs": True},
    {"solver": "ipndm", "nfe": 3, "solver_options": {"max_order": 2}},
    {"solver": "ipndm", "nfe": 3, "schedule": "logsnr"},
    {"solver": "ipndm", "nfe": 3, "schedule": "polynomial", "rho": 5.0},
    {"solver": "euler", "schedule": torch.tensor([8.0, 4.0, 1.0])},
    {"solver": "euler", "schedule": torch.tensor([8.0, 4.0, 1.5])},
    {"predictor": 1},
    {"predictor": 2},
]


def test_programs_of_different_value_are_not_one(engine):
    said = {"solver": "amed", "nfe": 4, "afs": False, "schedule": "polynomial"}
    for options in DIFFERENT:
        options = dict(options)
        if "predictor" in options:
            options["predictor"] = mixed.learned(options["predictor"])
            options["predictor"].plan = mixed.plan_of(said, {}, midpoint=True)
        engine.submit([1], **options).result(PATIENCE)
    assert len(tables(engine)) == len(DIFFERENT)


def test_a_predictor_that_is_changed_is_another(engine, network):
    predictor = mixed.learned(1)
    said = {"solver": "amed", "nfe": 4, "afs": False, "schedule": "polynomial"}
    predictor.plan = mixed.plan_of(said, {}, midpoint=True)
    before = engine.submit([1], 0, predictor=predictor).result(PATIENCE).images
    with torch.no_grad():
        predictor.fc_r.bias.add_(1.0)
    after = engine.submit([1], 0, predictor=predictor).result(PATIENCE).images
    assert not torch.allclose(before, after, rtol=1e-4)
    expected = Sampler(network, predictor, verify=False).run([1], 0).images
    torch.testing.assert_close(after, expected, rtol=2e-5, atol=2e-5)


def test_programs_and_tables_are_bounded(engine):
    """More programs than are kept, and than the device has room for at once."""
    for k in range(KEPT + 20):
        engine.submit([1], solver="euler", schedule=torch.tensor([8.0 + k, 4.0, 1.0])).result(PATIENCE)
    assert len(programs(engine)._prepared) == KEPT
    assert len(programs(engine)._tables) <= KEPT
    bank = engine._loop.rows.bank
    assert len(bank._held) <= bank._slots < KEPT


def test_programs_that_are_made_by_many_threads_are_made_once(engine):
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda k: engine.submit([k], **SAID), range(8)))
    assert all(future.result(PATIENCE) for future in futures)
    assert len(programs(engine)._prepared) == 1
