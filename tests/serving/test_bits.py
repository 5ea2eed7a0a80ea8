"""With one bucket, a sample's bits are its own: no company, no row, no phase of the ring changes them."""

import random
from concurrent.futures import CancelledError

import mixed
import pytest
import torch

from amed_engine import ContinuousSampler, NonFiniteError
from amed_engine.serving.table import tabulated

BUCKET = 16


@pytest.fixture(scope="module")
def predictor():
    made = mixed.learned(4, bottleneck=(4, 4))  # of the tiny network
    made.plan = mixed.plan_of({"solver": "amed", "nfe": 4, "afs": False, "schedule": "polynomial"}, {}, midpoint=True)
    return made


def asked(predictor):
    """A request of each kind whose bits are compared."""
    return {
        "plain": ((21,), {"solver": "ipndm", "nfe": 6}),
        "data prediction": ((22,), {"solver": "unipc", "nfe": 7, "solver_options": {"max_order": 3}}),
        "guided": ((23,), {"solver": "deis", "nfe": 5, "guidance_scale": 2.5}),
        "learned": ((24,), {"predictor": predictor}),
        "with fresh noises": ((25,), {"solver": "consistency", "nfe": 4}),
    }


def options(predictor, generator):
    """Of other people's requests."""
    more = [{"solver": s, "nfe": 2 * n} for s in ("heun", "dpm", "euler", "dpmpp") for n in (1, 3)]
    more += [{"solver": "ipndm", "nfe": 4, "guidance_scale": g} for g in (0.5, 7.0)]
    return generator.choice([*more, {"predictor": predictor}, {"solver": "consistency", "nfe": 5}])


@pytest.fixture(params=["tiny", "digits"])
def model(request):
    return request.getfixturevalue("tiny_conditional") if request.param == "tiny" else "digits"


def made(model, **more):
    return ContinuousSampler(model, buckets=(BUCKET,), verify=False, **more)


def test_the_same_bits_alone_and_in_any_company(model, predictor):
    generator, own = random.Random(0), asked(predictor)
    if model == "digits":
        own.pop("learned")
    with made(model) as engine:
        assert engine.rows == BUCKET
        alone = {name: engine.submit(list(seeds), **said).result(60) for name, (seeds, said) in own.items()}
        taken = []
        with mixed.held(engine):
            for round_ in range(4):
                others = [(predictor, generator) for _ in range(generator.randrange(2, 9))]
                for each in others:
                    said = options(*each)
                    if model == "digits" and "predictor" in said:
                        continue
                    engine.submit([generator.randrange(1000)], **said)
                names = list(own)
                generator.shuffle(names)
                for name in names:
                    seeds, said = own[name]
                    taken.append((name, round_, engine.submit(list(seeds), **said)))
        for name, round_, future in taken:
            result = future.result(60)
            assert result.buckets == (BUCKET,)
            assert torch.equal(result.images, alone[name].images), (name, round_)


@pytest.mark.parametrize("guided", [False, True])
def test_in_any_row_and_in_any_phase(tiny_conditional, guided):
    said = {"solver": "unipc", "nfe": 5, "solver_options": {"max_order": 3}, "guidance_scale": 3.0 if guided else None}
    with made(tiny_conditional, history=3) as engine:
        alone = engine.submit([7], **said).result(60).images[0]
        for row in range(BUCKET):
            with mixed.held(engine):
                engine.submit(list(range(100, 100 + row)), solver="euler", nfe=1 + row % 4) if row else None
                future = engine.submit([7] * (BUCKET - row), **said)
            assert all(torch.equal(image, alone) for image in future.result(60).images), row


class Spoiled(mixed.Classes):
    """NaN for the samples of class 3, in every place."""

    def forward(self, x, sigma, labels):
        d, features = super().forward(x, sigma, labels)
        bad = labels[:, 3] == 1
        return d.masked_fill(bad[:, None, None, None], float("nan")), features


def test_rows_that_fail_or_are_cancelled_change_nobody(tiny_conditional):
    model = Spoiled()
    said = {"solver": "ipndm", "nfe": 6}
    with made(model) as engine:
        alone = engine.submit([1, 2], [0, 1], **said).result(60).images
        with mixed.held(engine):
            failing = [engine.submit([k], 3, solver="heun", nfe=8) for k in range(3)]
            cancelled = engine.submit([5, 6], 2, **said)
            future = engine.submit([1, 2], [0, 1], **said)
            cancelled.cancel()
        assert torch.equal(future.result(60).images, alone)
        for each in failing:
            with pytest.raises(NonFiniteError):
                each.result(60)
        with pytest.raises(CancelledError):
            cancelled.result(0)


@pytest.mark.parametrize("buckets", [None, (4,)])
def test_nothing_of_a_former_occupant_is_left(buckets):
    """Not in its anchor, point, directions, midpoint or guidance: NaN would show, whatever the coefficient."""
    model = Spoiled()
    predictor = mixed.learned(1)
    predictor.plan = mixed.plan_of(
        {"solver": "ipndm", "nfe": 3, "afs": True, "schedule": "polynomial"}, {}, midpoint=True
    )
    for said in ({"solver": "ipndm", "nfe": 5}, {"predictor": predictor}, {"solver": "consistency", "nfe": 3}):
        with ContinuousSampler(model, 4, buckets=buckets, verify=False) as engine:
            clean = engine.submit([1, 2, 3, 4], [0, 1, 2, 0], **said).result(60).images
            for length in (1, 3, 4):
                with pytest.raises(NonFiniteError):
                    engine.submit([9] * 4, 3, nfe=length, solver="unipc", guidance_scale=5.0).result(60)
                with pytest.raises(NonFiniteError):
                    engine.submit([9] * 4, 3, predictor=predictor).result(60)
                assert torch.equal(engine.submit([1, 2, 3, 4], [0, 1, 2, 0], **said).result(60).images, clean), said


def test_a_guided_row_beside_none_that_is_and_beside_all_that_are(tiny_conditional):
    """A scale of 1 is no guidance, to the last bit."""
    said = {"solver": "ipndm", "nfe": 5}
    with made(tiny_conditional) as engine:
        plain = engine.submit([3], 4, **said).result(60).images
        with mixed.held(engine):
            beside = engine.submit([3], 4, guidance_scale=1.0, **said)
            engine.submit([8], 5, guidance_scale=4.0, **said)
        assert torch.equal(beside.result(60).images, plain)


def test_the_buckets_of_a_result_are_those_that_ran():
    model = mixed.Classes()
    with ContinuousSampler(model, 8, buckets=(2, 8), verify=False) as engine:
        with mixed.held(engine):
            long = engine.submit([1], solver="euler", nfe=6)
            short = engine.submit([2, 3], solver="euler", nfe=2)
        assert (short.result(60).buckets, long.result(60).buckets) == ((8,), (2, 8))
        assert engine.stats().evaluated == 2 * 8 + 4 * 2


def test_the_tables_of_a_predictor_and_of_none_are_rounded_alike(tiny_conditional, predictor):
    """Once a predictor was seen, coefficients of plain rows come by the basis, and stay what they were."""
    said = {"solver": "deis", "nfe": 6}
    with made(tiny_conditional) as engine:
        before = engine.submit([3], 4, **said).result(60).images
        table = tabulated(predictor.plan.program(predictor), 10)
        assert table.predictor is predictor
        with mixed.held(engine):
            engine.submit([8], 5, predictor=predictor)
            after = engine.submit([3], 4, **said)
        assert torch.equal(after.result(60).images, before)
