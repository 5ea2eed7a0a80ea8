"""Conditions that are numbers per sample, wherever classes are taken; never one-hot, never drawn, refused where only classes
serve."""

import shutil

import numpy
import pytest
import torch
from torch import nn

import amed_engine
from amed_engine.adapters import ClassifierFree, ClassifierGuided, Thresholded, load_compiled, save_package, wrap
from amed_engine.adapters.signature import Signature
from amed_engine.engine.graphs import GraphCache
from amed_engine.engine.resolve import resolve
from amed_engine.errors import ConfigError
from amed_engine.integrations.serving.hosted import Hosted

SHAPE = (1, 8, 8)


class Told(nn.Module):
    """(x, time, numbers in the form that is asked for) -> a prediction that depends on them."""

    def __init__(self, width):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(max(width, 1), generator=generator))
        self.middle_block, self.width = nn.Conv2d(1, 2, 3, stride=2, padding=1), width
        nn.init.constant_(self.middle_block.weight, 0.1)
        nn.init.zeros_(self.middle_block.bias)

    def forward(self, x, time, numbers):
        told = numbers[:, None] if self.width == 0 else numbers
        push = (told.to(x) * self.weight).sum(1).reshape(-1, 1, 1, 1)
        return 0.3 * x * (1 + 0.1 * push) + 0 * self.middle_block(x).mean()


def one(prediction="edm"):
    return wrap(Told(0), prediction, labels="float", shape=SHAPE)


def three():
    return wrap(Told(3), "edm", labels="vector", label_dim=3, shape=SHAPE)


def sampler(denoiser, **options):
    return amed_engine.Sampler(denoiser, **{"solver": "euler", "nfe": 3} | options)


def test_what_is_told_is_said():
    assert "a number per sample (B,)" in one().explain()
    assert "3 numbers per sample" in three().explain()
    assert (one().label_kind, one().label_dim, one().can_guide) == ("float", 1, False)


@pytest.mark.parametrize(
    "same",
    [
        torch.tensor([2.0, 0.5]),
        torch.tensor([[2.0], [0.5]]),
        torch.tensor([2.0, 0.5], dtype=torch.float64),
        numpy.array([2.0, 0.5]),
        [[2.0], [0.5]],
    ],
)
def test_a_number_per_sample_in_any_form(same):
    engine = sampler(one())
    expected = engine.run([1, 2], [2.0, 0.5])
    torch.testing.assert_close(engine.run([1, 2], same).images, expected.images)
    alone = torch.cat([engine.run([1], 2.0).images, engine.run([2], 0.5).images])
    torch.testing.assert_close(expected.images, alone)
    assert expected.labels.tolist() == [2.0, 0.5]


def test_integers_are_numbers_and_no_classes():
    engine = sampler(one())
    torch.testing.assert_close(engine.run([1, 2], [0, 3]).images, engine.run([1, 2], [0.0, 3.0]).images)
    assert engine.run([1, 2], 3).labels.tolist() == [3.0, 3.0]
    rows = [[1, 0, 2], [0, 1, 5]]
    vectors = sampler(three())
    torch.testing.assert_close(vectors.run([1, 2], rows).images, vectors.run([1, 2], torch.tensor(rows).float()).images)
    with pytest.raises(ConfigError, match=r"3 numbers per sample .*got torch.int64 of shape \(2,\)"):
        vectors.run([1, 2], [0, 1])


def test_one_vector_is_for_all():
    engine = sampler(three())
    given = [0.1, 0.2, 0.7]
    torch.testing.assert_close(engine.run(4, given).images.shape, torch.Size([4, *SHAPE]))
    torch.testing.assert_close(engine.run([1, 2, 3], given).images, engine.run([1, 2, 3], [given] * 3).images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "class_labels are missing: this model is told a number per sample"),
        ([0.1], r"one number, 2 of them, or rows \(2, 1\); got torch.float32 of shape \(1,\)"),
        ([0.1, float("nan")], "NaN or infinite"),
        ([0.1, float("inf")], "NaN or infinite"),
        ([True, False], "got torch.bool"),
        (torch.zeros(2, 2), r"got torch.float32 of shape \(2, 2\)"),
        (torch.zeros(2, dtype=torch.complex64), "got torch.complex64"),
        ("0.1", "class numbers or vectors"),
    ],
)
def test_what_is_no_number_per_sample_is_refused(labels, message):
    with pytest.raises(ConfigError, match=message):
        sampler(one()).run([1, 2], labels)


def test_a_denoiser_is_called_with_them():
    denoiser, x, sigma = one(), torch.ones(2, *SHAPE), torch.ones(2)
    given = denoiser(x, sigma, torch.tensor([2.0, 0.5])).x0
    torch.testing.assert_close(given, denoiser(x, sigma, torch.tensor([[2.0], [0.5]])).x0)
    torch.testing.assert_close(denoiser(x, sigma, torch.tensor([2])).x0[1], given[0])
    for labels, message in [
        (None, "missing"),
        (torch.zeros(2, 2), "1 number per sample here"),
        (torch.zeros(3), "3 rows for a batch of 2"),
        (torch.tensor([True, False]), "real numbers"),
    ]:
        with pytest.raises(ConfigError, match=message):
            denoiser(x, sigma, labels)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"labels": "flot"}, "labels must be 'rows' or 'index' .* got 'flot'"),
        ({"labels": "vector"}, "needs label_dim"),
        ({"labels": "float", "label_dim": 2}, "use labels='vector'"),
        ({"labels": "float", "null_class": 3}, "null_class=3 is a class"),
    ],
)
def test_kinds_that_contradict_are_refused(facts, message):
    with pytest.raises(ConfigError, match=message):
        wrap(Told(0), "edm", shape=SHAPE, **facts)


def test_a_single_label_of_an_unknown_network_is_a_number():
    engine = sampler(lambda x, sigma, rows: 0.5 * x + rows[:, :, None, None], shape=SHAPE, label_dim=1)
    torch.testing.assert_close(engine.run([1, 2], [0, 1]).images, engine.run([1, 2], [0.0, 1.0]).images)
    with pytest.raises(ConfigError, match="which no seed draws"):
        engine.run([1, 2])
    network = Told(3)
    network.label_dim, network.label_kind = 3, "numbers"
    with pytest.raises(ConfigError, match=r"label_kind must be one of .* got 'numbers'"):
        resolve(network)


def test_guidance_has_no_class_to_lead_away_from():
    with pytest.raises(ConfigError, match="told numbers, none of which means that"):
        sampler(one()).run([1, 2], [0.1, 0.2], guidance_scale=2.0)
    with pytest.raises(ConfigError, match="trained without its condition"):
        ClassifierFree(one(), 2.0)
    with pytest.raises(ConfigError, match="takes classes, and the network's own labels are numbers"):
        ClassifierGuided(one("epsilon"), nn.Flatten(), 2.0, label_dim=1)
    around = sampler(Thresholded(one(), floor=1.0))  # keeps what its denoiser is told
    torch.testing.assert_close(around.run([1, 2], [0, 2]).images, around.run([1, 2], [0.0, 2.0]).images)


def test_no_mean_answer_is_theirs():
    with pytest.raises(ConfigError, match="of which it would be a function"):
        amed_engine.measure_mean(one())
    with pytest.raises(ConfigError, match="pass another afs"):
        sampler(one(), afs="mean")


def test_graphs_pad_and_split_them(double):
    denoiser, labels = one(), torch.linspace(0, 1, 6)
    engine = sampler(denoiser)
    expected = engine.run(range(6), labels).images
    engine._runner.cache = GraphCache(double, (1, 4), denoiser, warmups=1)
    result = engine.run(range(6), labels)
    assert result.backend == "graph"
    torch.testing.assert_close(result.images, expected)
    assert engine.warmup().backend == "graph"


TRAINING = {"samples": 8, "batch": 8, "progress": False}
ENTRIES = [torch.linspace(0, 1, 8)[:, None]]


def work(kind, conditions=None):
    if kind == "fit":
        return amed_engine.fit(one(), nfe=3, early=1, late=1, starts=1, conditions=conditions, **TRAINING)
    if kind == "search":
        return amed_engine.search_schedule(one(), nfe=3, grid=11, conditions=conditions, **TRAINING)
    if kind == "distill":
        return amed_engine.distill(one(), nfe=3, batch=8, total_kimg=0.008, conditions=conditions, progress=False)
    return amed_engine.calibrate(one(), 2, batch=8, conditions=conditions, progress=False)


@pytest.mark.parametrize("kind", ["fit", "search", "distill", "calibrate"])
def test_training_takes_them_and_draws_none(kind):
    with pytest.raises(ConfigError, match=r"conditions are missing: this model is told a number .*\(8, 1\)"):
        work(kind)
    with pytest.raises(ConfigError, match="NaN or infinite"):
        work(kind, [ENTRIES[0] * float("nan")])
    made = work(kind, ENTRIES)
    flat = work(kind, [ENTRIES[0][:, 0]])
    if kind == "search":
        torch.testing.assert_close(made, flat)
    if kind == "fit":
        images = [amed_engine.Sampler(one(), predictor).run([1, 2], [0.2, 0.8]).images for predictor in (made, flat)]
        torch.testing.assert_close(*images)
        assert images[0].isfinite().all()


def test_packages_keep_what_their_labels_are(tmp_path):
    engine = sampler(one())
    path = engine.export(tmp_path / "loop.pt2", "exported").path
    package = amed_engine.load_package(path)
    assert package.facts.continuous
    assert package.facts.to_json()["labels"] == "continuous"
    torch.testing.assert_close(package.run([1, 2], [0, 2]).images, engine.run([1, 2], [0.0, 2.0]).images)
    with pytest.raises(ConfigError, match="which no seed draws"):
        package.run([1, 2])


def test_a_signature_keeps_what_its_labels_are():
    inputs = [{"dtype": "float32", "shape": list(shape)} for shape in (SHAPE, (), (3,))]
    data = {
        "inputs": inputs,
        "batch": (1, 4),
        "device": "cpu",
        "sigma_min": None,
        "sigma_max": None,
        "continuous": True,
    }
    signature = Signature.from_json(data, "file")
    assert signature.continuous
    assert signature.to_json() == data
    plain = Signature.from_json({name: value for name, value in data.items() if name != "continuous"}, "file")
    assert not plain.continuous
    assert "continuous" not in plain.to_json()


def served(denoiser):
    """The images that a server answers a request with."""
    hosted = Hosted(denoiser, solver="euler", nfe=3)
    return lambda payload: hosted.submit(payload).result(60).images


def test_servers_take_them():
    answer, engine = served(one()), sampler(one())
    torch.testing.assert_close(answer({"seeds": [1, 2], "class_labels": 0.5}), engine.run([1, 2], 0.5).images)
    torch.testing.assert_close(
        answer({"seeds": [3, 4], "class_labels": [0.5, 2]}), engine.run([3, 4], [0.5, 2.0]).images
    )
    for labels in ({}, {"class_labels": [0.1, 0.2]}, {"class_labels": [float("nan")]}, {"class_labels": True}):
        with pytest.raises(ConfigError, match="one number that the model is told"):
            answer({"seeds": [5], **labels})
    answer, row = served(three()), [0.1, 0.2, 0.3]
    first = answer({"seeds": [1, 2], "class_labels": row})
    torch.testing.assert_close(first, sampler(three()).run([1, 2], row).images)
    torch.testing.assert_close(answer({"seeds": [1], "class_labels": [row]}), first[:1])


@pytest.mark.slow
def test_compiled_packages_keep_what_their_labels_are(tmp_path):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler")
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        opened = load_compiled(save_package(three(), tmp_path / "net.pt2", max_batch=4))
    assert (opened.label_kind, opened.label_dim, opened.can_guide) == ("vector", 3, False)
    rows = [[0.1, 0.2, 0.3], [1, 0, 2]]
    torch.testing.assert_close(sampler(opened).run([1, 2], rows).images, sampler(three()).run([1, 2], rows).images)
    with pytest.raises(ConfigError, match="which no seed draws"):
        sampler(opened).run([1, 2])
