"""A request's own conditions are those of a sampler that has them bound."""

import pytest
import torch
from prompted import NONE, PLAN, PROMPTS, SHAPE, largest, made, prompts, wrapped

from amed_engine import ConfigError, ContinuousSampler, Sampler


@pytest.fixture
def net():
    return made()


@pytest.fixture
def told():
    return prompts()


@pytest.fixture
def bound(net, told):
    return wrapped(net, told, NONE)


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("buckets", [None, (4,)])
def test_they_draw_what_bound_ones_draw(bound, told, scale, buckets):
    expected = Sampler(bound, **PLAN, verify=False).run([1, 2, 3], [0, 1, 2], guidance_scale=scale).images
    with ContinuousSampler(bound, rows=4, buckets=buckets, verify=False) as engine:
        own = engine.submit([1, 2, 3], conditions=told, guidance_scale=scale, **PLAN)
        named = engine.submit([1, 2, 3], [0, 1, 2], guidance_scale=scale, **PLAN)
        one = engine.submit(
            [3], conditions={name: value[2:] for name, value in told.items()}, guidance_scale=scale, **PLAN
        )
        for found in (own.result(60), named.result(60)):
            assert largest(found.images, expected) < 2e-5
        assert largest(one.result(60).images, expected[2:]) < 2e-5
        assert own.result().labels is None
        assert named.result().labels.tolist() == [0, 1, 2]


def test_rows_of_several_requests_share_a_call_and_move_with_what_they_are_told(net, told, bound):
    sampler = {nfe: Sampler(bound, **{**PLAN, "nfe": nfe}, verify=False) for nfe in (2, 3, 5)}
    expected = {(nfe, k): sampler[nfe].run([k], [k]).images for nfe in sampler for k in range(PROMPTS)}
    net.seen.clear()
    with ContinuousSampler(bound, rows=4, verify=False) as engine:
        found = {
            (nfe, k): engine.submit([k], conditions={n: v[k : k + 1] for n, v in told.items()}, **{**PLAN, "nfe": nfe})
            for nfe, k in expected
        }
        for key, future in found.items():
            assert largest(future.result(60).images, expected[key]) < 2e-5
    assert max(net.seen) > 1


def test_without_bound_ones_the_first_request_says_their_shapes(net, told, bound):
    expected = Sampler(bound, **PLAN, verify=False).run([7], [1]).images
    with ContinuousSampler(wrapped(net, ["text", "mask"]), rows=2, shape=SHAPE, verify=False) as engine:
        with pytest.raises(ConfigError, match="conditions are missing: the network needs text, mask"):
            engine.submit([7], **PLAN)
        with pytest.raises(ConfigError, match="what the network is told for no prompt"):
            engine.submit([7], conditions=told, guidance_scale=2.0, **PLAN)
        own = {name: value[1:2] for name, value in told.items()}
        assert largest(engine.submit([7], conditions=own, **PLAN).result(60).images, expected) < 2e-5
        longer = {"text": torch.zeros(1, 9, 6), "mask": torch.ones(1, 9)}
        with pytest.raises(ConfigError, match=r"rows of shape .*9.*this engine.s are .*5"):
            engine.submit([7], conditions=longer, **PLAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditions": {"text": NONE["text"]}}, "lack mask"),
        ({"conditions": {**NONE, "noise": NONE["mask"]}}, "hold noise"),
        ({"conditions": {"text": torch.zeros(2, 5, 6), "mask": torch.ones(2, 5)}}, "2 rows for a batch of 3"),
        ({"conditions": [1]}, "tensors by name"),
        ({"conditions": {}}, "tensors by name, of text, mask"),
        ({"conditions": {"text": 1, "mask": 2}}, "condition 'text' must be a tensor"),
        ({"conditions": {**NONE, "text": NONE["text"].double() / 0}}, "'text' holds NaN or infinite"),
        ({"conditions": {**NONE, "text": NONE["text"].double() + 1e300}}, "such as torch.float32 does not hold"),
        ({"conditions": {**NONE, "mask": NONE["mask"] > 0}}, "'mask' is torch.bool, this engine's are torch.float32"),
        ({"conditions": NONE, "class_labels": 1}, "not both"),
        ({"conditions": NONE, "afs": "mean"}, "not known for new conditions"),
        ({"conditions": NONE, "solver": "dpmpp", "solver_options": {"thresholding": True}}, "programs in rows alone"),
    ],
)
def test_what_cannot_be_told_is_refused_at_once(bound, change, message):
    with ContinuousSampler(bound, rows=2, verify=False) as engine:
        with pytest.raises(ConfigError, match=message):
            engine.submit([1, 2, 3], **{**PLAN, **change})
        assert engine.stats().admitted == engine.stats().waiting == 0


def test_a_model_that_takes_none_refuses_them():
    with (
        ContinuousSampler("digits", rows=2) as engine,
        pytest.raises(ConfigError, match="this model takes none; leave them out"),
    ):
        engine.submit([1], conditions=NONE)


def test_the_first_request_s_precision_is_nobody_else_s(net, told, bound):
    """Nor are numbers cut to the integers, or the half precision, of who came first."""
    expected = Sampler(bound, **PLAN, verify=False).run([7], [1]).images
    own = {name: value[1:2] for name, value in told.items()}
    with ContinuousSampler(wrapped(net, ["text", "mask"]), rows=2, shape=SHAPE, verify=False) as engine:
        engine.submit([1], conditions={name: value.half() for name, value in own.items()}, **PLAN).result(60)
        assert largest(engine.submit([7], conditions=own, **PLAN).result(60).images, expected) < 2e-5
    with ContinuousSampler(wrapped(net, ["text", "mask"]), rows=2, shape=SHAPE, verify=False) as engine:
        engine.submit([1], conditions={**own, "mask": own["mask"].long()}, **PLAN).result(60)
        with pytest.raises(ConfigError, match=r"'mask' is torch\.float32, this engine's are torch\.int64"):
            engine.submit([7], conditions=own, **PLAN)
