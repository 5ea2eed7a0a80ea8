"""Requests of every kind in one engine, admitted as rows come free, against `Sampler.run` of each alone."""

import random
from concurrent.futures import wait
from itertools import islice

import mixed
import pytest
import torch

from amed_engine import ContinuousSampler, Sampler

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


def given(generator, dtype):
    """Seeds of one sample or several, or latents; and labels in every form, or none."""
    count = generator.choice([1, 1, 1, 2, 3])
    batch = [generator.randrange(1 << 32) for _ in range(count)]
    classes = [generator.randrange(mixed.CLASSES) for _ in range(count)]
    vectors = torch.rand(count, mixed.CLASSES, generator=torch.Generator().manual_seed(batch[0]))
    return batch, generator.choice([None, classes[0], classes, torch.tensor(classes), vectors])


def assert_same(result, expected, what):
    error = float((result.images - expected.images).abs().max() / expected.images.abs().max())
    assert error < TOLERANCE[expected.images.dtype], (what, error)
    assert result.images.dtype == expected.images.dtype
    assert (result.nfe, result.seeds, result.plan) == (expected.nfe, expected.seeds, expected.plan), what
    assert (result.labels is None) == (expected.labels is None)
    if expected.labels is not None:
        assert result.labels.dtype == expected.labels.dtype
        assert torch.equal(result.labels, expected.labels), what


def drawn(engine, model, dtype, requests, programs, seed):
    """(result of the engine, of the sampler alone, what it was) of so many requests, all of them in at once."""
    generator = random.Random(seed)
    asked = list(islice(mixed.asks(generator), programs))
    taken = []
    with mixed.held(engine):
        for _ in range(requests):
            ask, arguments = generator.choice(asked), given(generator, dtype)
            if "consistency" not in ask.name and generator.random() < 0.2:
                latents = torch.randn(len(arguments[0]), *mixed.SHAPE, generator=torch.Generator().manual_seed(seed))
                arguments = (latents.to(dtype), arguments[1])
            options = {**ask.program, "guidance_scale": ask.guidance, "priority": generator.randrange(3)}
            taken.append((ask, arguments, engine.submit(*arguments, **options)))
    wait([future for *_, future in taken], timeout=300)
    for ask, arguments, future in taken:
        yield future.result(0), ask.alone(model, dtype, *arguments), (ask.name, ask.guidance)


@pytest.mark.parametrize(
    ("dtype", "requests", "programs", "rows", "buckets", "history"),
    [
        (torch.float32, 2000, 150, 7, None, 10),
        (torch.float32, 200, 60, 8, (3, 8), 13),
        (torch.float64, 300, 100, 5, None, 11),
    ],
    ids=["2000 in float32", "two buckets", "300 in float64"],
)
def test_mixed_requests_equal_sampler_run(dtype, requests, programs, rows, buckets, history):
    model = mixed.Classes(dtype)
    with ContinuousSampler(
        model, rows, dtype=dtype, buckets=buckets, history=history, queue=10 * requests, verify=False
    ) as engine:
        for result, expected, what in drawn(engine, model, dtype, requests, programs, seed=rows):
            assert result.backend == "ticks", what
            assert set(result.buckets) <= set(buckets or range(1, rows + 1))
            assert_same(result, expected, what)
        stats = engine.stats()
    assert stats.completed == stats.admitted > requests
    assert stats.evaluations > (rows - 1) * stats.ticks  # the rows were full
    assert (stats.live, stats.waiting, stats.failed, stats.beside) == (0, 0, 0, 0)


def test_digits_with_all_that_they_bring():
    """Bundled predictors, guidance that they step aside for, a mean that is measured with the model."""
    programs = [{"nfe": 3}, {"nfe": 5}, {"solver": "ipndm", "nfe": 4, "afs": "mean"}]
    samplers = [Sampler("digits", **program) for program in programs]
    runs = [([k, 11], labels, scale) for k, (labels, scale) in enumerate([(None, None), ([3, 7], None), (1, 2.0)])]
    with ContinuousSampler("digits", rows=6) as engine:
        taken = [
            (sampler, run, engine.submit(*run[:2], **program, guidance_scale=run[2]))
            for program, sampler in zip(programs, samplers, strict=True)
            for run in runs
        ]
        for sampler, run, future in taken:
            assert_same(future.result(60), sampler.run(*run), (sampler.plan.describe(), run))


def test_rows_that_stay_while_others_come_and_go_are_not_moved_wrongly():
    """Every length beside every other: what ends in the middle is closed up from behind, the ring in any phase."""
    model = mixed.Classes(torch.float64)
    with ContinuousSampler(model, rows=10, dtype=torch.float64, verify=False) as engine:
        samplers = [Sampler(model, solver="deis", nfe=n, dtype=torch.float64, verify=False) for n in range(1, 11)]
        asked = [(n, seed) for seed in range(13) for n in (9, 1, 7, 2, 10, 3, 5, 8, 4, 6)]
        futures = [engine.submit([seed], solver="deis", nfe=n) for n, seed in asked]
        for (n, seed), future in zip(asked, futures, strict=True):
            assert_same(future.result(60), samplers[n - 1].run([seed]), (n, seed))


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_models_that_are_told_numbers_or_nothing(tiny_model, guidance):
    if guidance is None:
        with ContinuousSampler(tiny_model, rows=3) as engine:
            futures = {n: engine.submit([5, n], solver="heun", nfe=n) for n in (2, 4, 6)}
            for n, future in futures.items():
                assert_same(future.result(60), Sampler(tiny_model, solver="heun", nfe=n).run([5, n]), n)
    else:
        told = Told()
        with ContinuousSampler(told, rows=3, verify=False) as engine:
            future = engine.submit([5, 6], [0.25, guidance], solver="euler", nfe=3)
            expected = Sampler(told, solver="euler", nfe=3, verify=False).run([5, 6], [0.25, guidance])
            assert_same(future.result(60), expected, "numbers")


class Told(torch.nn.Module):
    """Told one number per sample."""

    sample_shape, label_dim, label_kind = (2, 3), 1, "vector"

    def forward(self, x, sigma, labels):
        return (x + labels[:, :, None]) / (1 + sigma.reshape(-1, 1, 1) ** 2)
