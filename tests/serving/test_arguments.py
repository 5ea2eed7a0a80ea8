"""Every form of an argument, and every wrong one, which is refused in the caller at once."""

import threading

import mixed
import numpy as np
import pytest
import torch
from engines import BESIDE, PATIENCE, SAID, Network, alone, is_empty

from amed_engine import (
    ConfigError,
    ContinuousSampler,
    FileFormatError,
)


def test_seeds_in_every_form(engine):
    expected = engine.submit([3, 4], **SAID).result(PATIENCE).images
    for seeds in ((3, 4), range(3, 5), np.array([3, 4]), np.array([3, 4], dtype=np.uint8), torch.tensor([3, 4])):
        result = engine.submit(seeds, **SAID).result(PATIENCE)
        assert (result.seeds, torch.equal(result.images, expected)) == ([3, 4], True)
    assert len(engine.submit(np.int64(2), **SAID).result(PATIENCE).seeds) == 2


def test_latents_in_every_form(engine):
    latents = torch.randn(2, *mixed.SHAPE)
    expected = engine.submit(latents, 1, **SAID).result(PATIENCE).images
    last = latents.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for given in (latents.numpy(), latents.clone().requires_grad_(), last):
        result = engine.submit(given, 1, **SAID).result(PATIENCE)
        assert result.seeds is None
        assert not result.images.requires_grad
        assert torch.equal(result.images, expected)


def test_latents_and_labels_are_read_when_they_are_given(engine):
    latents, vectors = torch.randn(1, *mixed.SHAPE), torch.rand(1, mixed.CLASSES)
    expected = engine.submit(latents, vectors, **SAID).result(PATIENCE)
    with mixed.held(engine):
        given = latents.clone(), vectors.clone()
        future = engine.submit(*given, **SAID)
        given[0].zero_(), given[1].zero_()
    assert torch.equal(future.result(PATIENCE).images, expected.images)
    assert torch.equal(future.result(PATIENCE).labels, vectors)


LABELS = [
    (2, [2, 2]),
    ([2, 0], [2, 0]),
    (np.array([2, 0]), [2, 0]),
    (torch.tensor([2, 0], dtype=torch.int32), [2, 0]),
    (np.int64(2), [2, 2]),
]


@pytest.mark.parametrize("labels", LABELS, ids=lambda case: type(case[0]).__name__)
def test_class_labels_in_every_form(engine, network, labels):
    result = engine.submit([3, 4], labels[0], **SAID).result(PATIENCE)
    assert result.labels.tolist() == labels[1]
    torch.testing.assert_close(result.images, alone(network, [3, 4], labels[1]).images, rtol=2e-5, atol=2e-5)


def test_class_labels_as_vectors(engine, network):
    vectors = torch.eye(mixed.CLASSES)[[2, 0]] * 0.5
    result = engine.submit([3, 4], vectors, **SAID).result(PATIENCE)
    assert torch.equal(result.labels, vectors)
    torch.testing.assert_close(result.images, alone(network, [3, 4], vectors).images, rtol=2e-5, atol=2e-5)


WRONG = {
    "no seeds": ([], {}, "the batch is empty"),
    "no number of seeds": (0, {}, "at least 1 sample"),
    "a negative number": (-1, {}, "at least 1 sample"),
    "a flag for seeds": (True, {}, "number of samples, a sequence of seeds"),
    "text for seeds": ("12", {}, "number of samples, a sequence of seeds"),
    "no seeds at all": (None, {}, "number of samples, a sequence of seeds"),
    "a broken seed": ([1.5], {}, "seeds must be integers"),
    "a large seed": ([1 << 32], {}, "outside 0 .. 2"),
    "shape of latents": (torch.zeros(1, 1, 5, 4), {}, "latents must have shape"),
    "dtype of latents": (torch.zeros(1, *mixed.SHAPE, dtype=torch.float64), {}, "latents must be torch.float32"),
    "no latents": (torch.zeros(0, *mixed.SHAPE), {}, "the batch is empty"),
    "latents that are NaN": (torch.full((2, *mixed.SHAPE), torch.nan), {}, "NaN or infinite values in rows"),
    "latents for fresh noise": (torch.zeros(1, *mixed.SHAPE), {"solver": "consistency", "nfe": 3}, "adds fresh noise"),
    "backward array": (np.arange(3)[::-1], {}, "negative strides"),
    "a class too many": ([1], {"class_labels": 4}, "class_labels must be in 0 .. 3"),
    "a class for others": ([1], {"class_labels": [1, 2]}, "class_labels must be one integer, 1 integers"),
    "no class": ([1], {"class_labels": "cat"}, "class_labels must be class numbers or vectors"),
    "a class that is NaN": ([1], {"class_labels": torch.full((1, 4), torch.nan)}, "NaN or infinite"),
    "solver": ([1], {"solver": "magic"}, "unknown solver 'magic'"),
    "solver's kind": ([1], {"solver": ["ipndm"]}, "unknown solver"),
    "nfe": ([1], {"solver": "euler", "nfe": 0}, "nfe must be a positive integer"),
    "half an evaluation": ([1], {"solver": "euler", "nfe": 2.5}, "nfe must be a positive integer"),
    "a flag for nfe": ([1], {"solver": "euler", "nfe": True}, "nfe must be a positive integer"),
    "odd nfe": ([1], {"solver": "heun", "nfe": 3, "afs": False}, "not a whole number of intervals"),
    "option": ([1], {"solver": "ipndm", "solver_options": {"order": 3}}, "has no option order"),
    "option's value": ([1], {"solver": "ipndm", "solver_options": {"max_order": 9}}, "max_order"),
    "options' kind": ([1], {"solver": "ipndm", "solver_options": ["max_order"]}, "solver_options must be a dict"),
    "option's name": ([1], {"solver": "ipndm", "solver_options": {1: 3}}, "has no option 1"),
    "options of two kinds": ([1], {"solver": "ipndm", "solver_options": {1: 3, "r": 2}}, "has no option 1, r"),
    "option called name": ([1], {"solver": "ipndm", "solver_options": {"name": 3}}, "has no option name"),
    "options without solver": ([1], {"solver_options": {"max_order": 3}}, "solver_options need a solver"),
    "schedule": ([1], {"schedule": "linear"}, "unknown schedule 'linear'"),
    "schedule's kind": ([1], {"schedule": [80.0, 1.0]}, "schedule must be a name"),
    "a schedule of lists": ([1], {"schedule": ([80.0], [1.0])}, "schedule must be a name"),
    "rising levels": ([1], {"schedule": torch.tensor([1.0, 2.0])}, "decreas"),
    "levels that are NaN": ([1], {"schedule": torch.tensor([torch.nan, 1.0])}, "finite"),
    "rho": ([1], {"schedule": "polynomial", "rho": -1.0}, "rho must be a positive number"),
    "rho's kind": ([1], {"schedule": "polynomial", "rho": [7]}, "rho must be a positive number"),
    "afs": ([1], {"afs": "zero"}, "afs must be True, False, 'mean' or None"),
    "predictor": ([1], {"predictor": 3}, "predictor must be one of this package"),
    "plan": ([1], {"plan": {"solver": "euler"}}, "plan must be a Plan"),
    "guidance": ([1], {"guidance_scale": "2"}, "guidance_scale must be a finite number"),
    "infinite guidance": ([1], {"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
    "no deadline": ([1], {"deadline": 0}, "deadline must be seconds from now"),
    "a past deadline": ([1], {"deadline": -2.0}, "deadline must be seconds from now"),
    "deadline that is NaN": ([1], {"deadline": float("nan")}, "deadline must be seconds from now"),
    "deadline's kind": ([1], {"deadline": "soon"}, "deadline must be seconds from now"),
    "priority": ([1], {"priority": 1.5}, "priority must be an integer"),
    "a flag for priority": ([1], {"priority": True}, "priority must be an integer"),
    "on_sample": ([1], {"on_sample": 3}, "on_sample must be a function"),
}


@pytest.fixture(scope="module")
def refusing():
    with ContinuousSampler(Network(), rows=4, queue=16, verify=False) as engine:
        yield engine


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_in_the_caller_at_once(refusing, name):
    seeds, options, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        refusing.submit(seeds, **options)
    assert is_empty(refusing)
    if "on_sample" not in options:
        with pytest.raises(ConfigError, match=message):
            refusing.cost(seeds, **options)
    assert (refusing.model.network.calls, refusing.stats().refused) == (0, 0)


def test_files_that_are_none_are_refused_in_the_caller(engine, tmp_path):
    (tmp_path / "broken").write_text("{")
    for name in ("plan", "predictor"):
        with pytest.raises((FileFormatError, ConfigError)):
            engine.submit([1], **{name: tmp_path / "broken"})
    assert is_empty(engine)


MADE_WRONG = {
    "rows": ({"rows": 0}, "rows must be an integer from 1 to 4096"),
    "rows' kind": ({"rows": 2.0}, "rows must be an integer"),
    "history": ({"history": 14}, "history must be an integer from 1 to 13"),
    "queue": ({"queue": -1}, "queue must be an integer from 0"),
    "dtype": ({"dtype": torch.float16}, "dtype is the state's"),
    "backend": ({"backend": "turbo"}, "backend must be one of"),
    "graphs": ({"backend": "graph"}, "backend='graph' needs a CUDA device"),
    "no buckets": ({"buckets": ()}, "buckets must be positive integers"),
    "buckets": ({"buckets": (0, 4)}, "buckets must be positive integers"),
    "buckets' kind": ({"buckets": (2.5,)}, "buckets must be positive integers"),
}


@pytest.mark.parametrize("name", MADE_WRONG)
def test_an_engine_that_cannot_work_is_refused_and_starts_no_thread(network, name):
    options, message = MADE_WRONG[name]
    before = threading.active_count()
    with pytest.raises(ConfigError, match=message):
        ContinuousSampler(network, **options, verify=False)
    assert threading.active_count() == before


def test_a_shape_that_nobody_said_is_asked_for(gaussian_denoiser):
    with pytest.raises(ConfigError, match="does not say what shape"):
        ContinuousSampler(gaussian_denoiser)
    with ContinuousSampler(gaussian_denoiser, rows=2, shape=(2, 3)) as engine:
        assert engine.submit([1], **SAID).result(PATIENCE).images.shape == (1, 2, 3)
        with pytest.raises(ConfigError, match="guidance_scale needs a class-conditional model"):
            engine.submit([1], guidance_scale=2.0)
        with pytest.raises(ConfigError, match="class_labels were given, but the model is unconditional"):
            engine.submit([1], 3)


def test_the_callers_modes_have_no_say(network):
    """inference_mode makes tensors that nobody else may write to, and a default dtype or device other numbers."""
    expected = alone(network, [1, 2], [0, 1]).images
    with torch.inference_mode():
        engine = ContinuousSampler(network, rows=2, verify=False)
        futures = [engine.submit([1, 2], [0, 1], **SAID), engine.submit([1, 2], [0, 1], **BESIDE["thresholding"])]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        futures.append(engine.submit([1, 2], [0, 1], **SAID))
        images = [future.result(PATIENCE).images for future in futures]
    finally:
        torch.set_default_dtype(default)
        engine.close()
    for drawn in (images[0], images[2]):
        torch.testing.assert_close(drawn, expected, rtol=2e-5, atol=2e-5)
        assert not drawn.is_inference()
