"""The engine that the servers hold: any requests at once, each its own answer, each its own error."""

import asyncio
import json
import threading

import pytest
import torch
from hosts import PAYLOADS, WRONG, expected, same_pictures

from amed_engine import (
    ConfigError,
    DeadlineError,
    EngineClosedError,
    FileFormatError,
    NonFiniteError,
    QueueFullError,
    Sampler,
    save_predictor,
)
from amed_engine.engine.seeds import draw
from amed_engine.integrations.serving.hosted import Hosted, refusal, status_of
from amed_engine.integrations.serving.requests import MAX_IMAGES, MAX_NFE, Asked, from_json
from amed_engine.zoo import bundled_predictor

SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def hosted():
    held = Hosted("digits", nfe=5, device="cpu", rows=16)
    yield held
    held.close()


def drawn(hosted, payload, options=None):
    """The images that it answers with, and what it drew them by."""
    result = hosted.submit({**payload, **(options or {})}).result(60)
    return result.images, result.plan


# Requests


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (None, "a request must be"),
        ({"class_labels": [1]}, "a request must be"),
        ({"seeds": [1], "steps": 3}, 'unknown key "steps"'),
        ({"seeds": [1], "predictor": "none"}, 'unknown key "predictor"'),
        ({"seeds": 5}, f"1 to {MAX_IMAGES} integers"),
        ({"seeds": []}, f"1 to {MAX_IMAGES} integers"),
        ({"seeds": list(range(MAX_IMAGES + 1))}, f"1 to {MAX_IMAGES} integers"),
        ({"seeds": [1.5]}, "seeds must be integers"),
        ({"seeds": [-1]}, "outside 0"),
        ({"seeds": [1], "class_labels": [10]}, "0 .. 9"),
        ({"seeds": [1], "class_labels": True}, "0 .. 9"),
        ({"seeds": [1], "class_labels": "3"}, "0 .. 9"),
        ({"seeds": [1, 2], "class_labels": [3]}, "or 2 of them"),
        ({"seeds": [1], "nfe": True}, f"nfe must be an integer from 1 to {MAX_NFE}, got True"),
        ({"seeds": [1], "nfe": 5.0}, "nfe must be"),
        ({"seeds": [1], "nfe": MAX_NFE + 1}, "nfe must be"),
        ({"seeds": [1], "solver": 3}, "solver must be the name"),
        ({"seeds": [1], "guidance_scale": "2"}, "guidance_scale must be a number"),
        ({"seeds": [1], "guidance_scale": float("inf")}, "guidance_scale must be a number"),
        ({"seeds": [1], "guidance_scale": 10**400}, "guidance_scale must be a number"),
        ({"seeds": [1], "deadline": 0}, "deadline must be seconds from now"),
        ({"seeds": [1], "priority": 1.5}, "priority must be an integer"),
        ({"seeds": [1], "priority": 1 << 31}, "priority must be an integer"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(payload, match):
    with pytest.raises(ConfigError) as caught:
        Asked.parse(payload, label_dim=10)
    assert match in str(caught.value)


def test_a_request_says_what_it_wants_and_null_is_nothing():
    said = {"nfe": 8, "solver": "ipndm", "guidance_scale": 2, "deadline": 1.5, "priority": -1}
    assert Asked.parse({"seeds": [1, 2], "class_labels": 3, **said}, 10) == ([1, 2], [3, 3], said)
    assert Asked.parse({"seeds": [1], "class_labels": None, **dict.fromkeys(said)}, 10) == ([1], None, {})
    with pytest.raises(ConfigError, match="no classes; leave them out"):
        Asked.parse({"seeds": [1], "class_labels": 3}, 0)


@pytest.mark.parametrize("body", [b"", b"{not json", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_is_no_request(body):
    assert from_json(body) is None


# Answers


def test_requests_of_every_kind_share_ticks_and_are_answered_apart(hosted):
    async def all_at_once():
        return await asyncio.gather(*(hosted.draw(payload) for payload in PAYLOADS * 3), return_exceptions=True)

    before = hosted.engine.stats()
    answers, after = asyncio.run(all_at_once()), hosted.engine.stats()
    for i, (got, images) in enumerate(zip(answers, expected() * 3, strict=True)):
        if images is None:
            assert isinstance(got, ConfigError)
            assert WRONG[i % len(PAYLOADS)] in str(got)
        else:
            torch.testing.assert_close(got, images, rtol=0, atol=2e-5 * float(images.abs().max()))
    assert after.evaluations - before.evaluations > 2 * (after.ticks - before.ticks)


def test_pictures_are_png_files(hosted):
    payload = {"seeds": [3, 4], "class_labels": 7}
    answered = asyncio.run(hosted.pictures(payload))
    assert list(answered) == ["images"]
    assert same_pictures(answered, Sampler("digits", nfe=5, device="cpu").run([3, 4], class_labels=7).images)


def test_the_predictor_draws_what_names_neither_solver_nor_another_nfe(tmp_path):
    save_predictor(bundled_predictor("digits", nfe=5), path := tmp_path / "five.safetensors")
    held, payload = Hosted("digits", predictor=str(path), device="cpu"), {"seeds": [1]}
    path.unlink()  # it was read once
    own = bundled_predictor("digits", nfe=5).plan
    assert drawn(held, payload)[1] == drawn(held, payload, {"nfe": 5})[1] == own
    assert drawn(held, payload, {"nfe": 4})[1] == Sampler("digits", nfe=4, device="cpu").plan
    euler = drawn(held, payload, {"solver": "euler"})[1]
    assert (euler.solver, euler.nfe) == ("euler", 5)
    held.close()


def test_predictors_of_the_engine_draw_what_names_no_solver(tmp_path):
    for nfe in (3, 5):
        save_predictor(bundled_predictor("digits", nfe=nfe), tmp_path / f"{nfe}.safetensors")
    given = [str(tmp_path / f"{nfe}.safetensors") for nfe in (3, 5)]
    held, payload = Hosted("digits", predictors=given, nfe=3, device="cpu"), {"seeds": [1]}
    for said, nfe in (({}, 3), ({"nfe": 3}, 3), ({"nfe": 5}, 5)):
        assert drawn(held, payload, said)[1] == bundled_predictor("digits", nfe=nfe).plan
    assert drawn(held, payload, {"nfe": 4})[1] == Sampler("digits", "none", nfe=4, device="cpu").plan
    held.close()


def test_defaults_of_a_solver_stay_with_another_nfe():
    held = Hosted("digits", solver="ipndm", schedule="logsnr", nfe=4, device="cpu")
    for nfe, said in ((4, {}), (6, {"nfe": 6})):
        assert (
            drawn(held, {"seeds": [1]}, said)[1] == Sampler("digits", solver="ipndm", schedule="logsnr", nfe=nfe).plan
        )
    assert drawn(held, {"seeds": [1]}, {"solver": "euler"})[1] == Sampler("digits", solver="euler", nfe=4).plan
    held.close()


@pytest.mark.parametrize("name", ["plan", "schedule"])
def test_a_plan_and_noise_levels_leave_another_nfe_alone(name):
    plan = Sampler("digits", solver="dpmpp", nfe=4, afs=False, device="cpu").plan
    given = {"plan": plan} if name == "plan" else {"schedule": plan.levels, "solver": "dpmpp", "afs": False}
    held = Hosted("digits", **given, device="cpu")
    for said in ({}, {"nfe": 4}):
        assert drawn(held, {"seeds": [1]}, said)[1].sigmas == plan.sigmas
    rest = {} if name == "plan" else {"solver": "dpmpp", "afs": False}
    assert drawn(held, {"seeds": [1]}, {"nfe": 6})[1] == Sampler("digits", nfe=6, **rest, device="cpu").plan
    held.close()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_batch_size": 16}, "unknown options max_batch_size; known are model, rows"),
        ({"rows": 0}, "rows must be an integer"),
        ({"nfe": 0}, "nfe must be"),
        ({"solver": "nope"}, "unknown solver"),
        ({"model": "nope"}, "unknown model"),
    ],
)
def test_what_cannot_serve_is_not_started(options, match):
    with pytest.raises(ConfigError, match=match):
        Hosted(**options, device="cpu")


# Errors and ends


def smooth(x, sigma):
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


class Gate:
    """A denoiser that waits until it is opened."""

    def __init__(self):
        self.opened, self.entered = threading.Event(), threading.Event()

    def __call__(self, x, sigma):
        self.entered.set()
        assert self.opened.wait(60)
        return smooth(x, sigma)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


def small(denoiser, **options):
    return Hosted(denoiser, solver="euler", nfe=3, schedule="polynomial", afs=False, shape=SHAPE, **options)


def test_one_broken_sample_does_not_spoil_another():
    (noise,), _ = draw([1], SHAPE, 0)

    def denoiser(x, sigma):
        broken = (x / sigma.reshape(-1, 1, 1, 1) - noise).abs().amax((1, 2, 3), keepdim=True) < 1e-3
        return torch.where(broken, torch.nan, smooth(x, sigma))

    held = small(denoiser)
    bad, good = held.submit({"seeds": [1]}), held.submit({"seeds": [2]})
    assert isinstance(bad.exception(60), NonFiniteError)
    alone = Sampler(smooth, solver="euler", nfe=3, schedule="polynomial", afs=False, shape=SHAPE)
    torch.testing.assert_close(good.result(60).images, alone.run([2]).images)
    held.close()


def test_a_caller_that_goes_away_frees_its_rows(gate):
    held = small(gate, rows=4)

    async def leave():
        waiting = asyncio.create_task(held.draw({"seeds": [1, 2, 3]}))
        await asyncio.to_thread(gate.entered.wait, 60)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(leave())
    gate.opened.set()
    assert held.submit({"seeds": [4]}).result(60).images.isfinite().all()
    assert (held.engine.stats().cancelled, held.engine.stats().completed) == (3, 1)
    held.close()


def test_a_caller_that_goes_away_while_its_program_is_prepared_draws_nothing():
    held, begun, go_on = small(smooth), threading.Event(), threading.Event()
    submit = held.submit

    def slow(payload):
        begun.set()
        assert go_on.wait(60)
        return futures.setdefault("its", submit(payload))

    futures, held.submit = {}, slow

    async def leave():
        waiting = asyncio.create_task(held.draw({"seeds": list(range(64)), "nfe": 60}))
        await asyncio.to_thread(begun.wait, 60)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        while "its" not in futures or not futures["its"].done():
            await asyncio.sleep(0.001)

    asyncio.run(leave())
    assert futures["its"].cancelled()
    held.close()


def test_a_full_queue_and_a_late_deadline_are_refused(gate):
    held = small(gate, rows=2, queue=1)
    with pytest.raises(DeadlineError):
        held.submit({"seeds": [4], "deadline": 1e-9})
    taken = held.submit({"seeds": [1, 2, 3]})
    with pytest.raises(QueueFullError) as full:
        held.submit({"seeds": [4]})
    assert status_of(full.value) == 429
    gate.opened.set()
    assert len(taken.result(60).images) == 3
    held.close()


def test_what_was_taken_is_answered_at_the_end_and_nothing_after_it(gate):
    held = small(gate)
    taken = held.submit({"seeds": [1]})
    gate.opened.set()
    held.close()
    assert taken.result(0).images.isfinite().all()
    with pytest.raises(EngineClosedError):
        held.submit({"seeds": [2]})


@pytest.mark.parametrize(
    ("error", "status", "wait"),
    [
        (ConfigError("no"), 422, None),
        (FileFormatError("no"), 422, None),
        (QueueFullError("full", 0.01), 429, "1"),
        (QueueFullError("full", 7.2), 429, "8"),
        (EngineClosedError("closed"), 503, None),
        (DeadlineError("late"), 504, None),
        (NonFiniteError("nan", 1, [3]), 500, None),
    ],
)
def test_each_error_has_its_status(error, status, wait):
    pytest.importorskip("starlette")
    answered = refusal(error, "litserve")
    assert (answered.status_code, answered.headers.get("Retry-After")) == (status, wait)
    assert json.loads(answered.body) == {"error": str(error)}
