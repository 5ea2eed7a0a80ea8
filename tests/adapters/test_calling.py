"""Networks as others write them: where their noise level and classes go, what they return, and which tables they read."""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import amed_engine
from amed_engine.adapters import ClassifierFree, IndexedScore, wrap
from amed_engine.errors import ConfigError

X, SIGMA = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 3.0])


def plain(x, t):
    return 0.9 * x + 1e-4 * t.reshape(-1, 1, 1, 1)


def wrapped(network, **options):
    return wrap(network, "epsilon", shape=(3, 8, 8), **options)


# ---- arguments


@pytest.mark.parametrize(
    "network",
    [
        lambda x, *, timestep: plain(x, timestep),
        lambda sample, timestep: plain(sample, timestep),
        lambda x, noise_labels, class_labels=None: plain(x, noise_labels),
        lambda t, x: plain(x, t),
        lambda x, cond=None, t=None: plain(x, t),
        lambda x, t, sigma=None: plain(x, t),
        lambda x, anything: plain(x, anything),
        lambda *inputs: plain(*inputs),
        partial(lambda x, cond, t: plain(x, t), cond=None),
    ],
)
def test_the_noise_level_goes_where_the_signature_has_it(network):
    torch.testing.assert_close(wrapped(network)(X, SIGMA).x0, wrapped(plain)(X, SIGMA).x0)


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (lambda x: x, "no argument that is known to be the noise level"),
        (lambda x, mask=None: x, "no argument that is known to be the noise level"),
        (lambda x, **rest: x, "no argument that is known to be the noise level"),
        (lambda x, t, sigma: x, "which of t, sigma is the noise level"),
        (lambda x, cond, t: x, r"needs cond, which nobody gives: conditions=\['cond'\] names it"),
        (lambda x, t, y: x, "needs y, which nobody gives: label_dim="),
    ],
)
def test_signatures_that_leave_it_open_are_refused(network, told):
    with pytest.raises(ConfigError, match=told):
        wrapped(network)


def test_a_condition_between_state_and_noise_level_is_named():
    denoiser = wrapped(lambda x, cond, t: plain(x, t) + cond.mean(), conditions=["cond"])
    torch.testing.assert_close(denoiser(X, SIGMA, cond=torch.zeros(1, 2)).x0, wrapped(plain)(X, SIGMA).x0)


@pytest.mark.parametrize(
    "network",
    [
        lambda x, t, rows: plain(x, t) + rows.mean(1)[:, None, None, None],
        lambda x, t, mask=None, y=None: plain(x, t) + y.mean(1)[:, None, None, None],
        lambda x, t, mask=None, *, class_labels: plain(x, t) + class_labels.mean(1)[:, None, None, None],
    ],
)
def test_classes_go_where_the_signature_has_them(network):
    denoiser = wrapped(network, label_dim=4)
    expected = wrapped(lambda x, t: plain(x, t) + 0.25)(X, SIGMA).x0
    torch.testing.assert_close(denoiser(X, SIGMA, torch.tensor([1, 3])).x0, expected)
    with pytest.raises(ConfigError, match="none of its arguments can be told them"):
        wrapped(plain, label_dim=4)


# ---- answers


class Holder:
    def __init__(self, sample: Tensor):
        self.sample = sample


@dataclass
class Answer:
    out: Tensor
    loss: float | None = None


Named = namedtuple("Named", "sample features")


@pytest.mark.parametrize(
    "answer",
    [
        Holder,
        Answer,
        lambda v: {"sample": v, "hidden": 0 * v},
        lambda v: {"out": v, "loss": None},
        lambda v: Named(v, 0 * v),
        lambda v: ({"sample": v},),
        lambda v: [v],
    ],
)
def test_the_prediction_is_found_in_an_answer(answer):
    denoiser = wrapped(lambda x, t: answer(plain(x, t)))
    torch.testing.assert_close(denoiser(X, SIGMA).x0, wrapped(plain)(X, SIGMA).x0)


# ---- tables


class Embedded(nn.Module):
    """Steps and classes looked up, as nn.Embedding does it."""

    def __init__(self, steps: int = 1000, classes: int = 0):
        super().__init__()
        torch.manual_seed(0)
        self.steps = nn.Embedding(steps, 3) if steps else None
        self.classes = nn.Embedding(classes, 3) if classes else None

    def forward(self, x, t, y=None):
        for table, index in ((self.steps, t), (self.classes, y)):
            x = x if table is None else x + 0.1 * table(index)[:, :, None, None]
        return 0.9 * x


def test_steps_that_are_looked_up_are_told_whole():
    network = Embedded()
    for shape in ((3, 8, 8), None):
        with pytest.raises(ConfigError, match='steps="integer"'):
            wrap(network, "epsilon", shape=shape)(X, SIGMA)
    denoiser = wrapped(network, steps="integer")
    step = denoiser.family.time(SIGMA).round().long()
    scale = (1 / (1 + SIGMA**2).sqrt()).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser(X, SIGMA).x0, X - SIGMA.reshape(-1, 1, 1, 1) * network(scale * X, step))
    assert amed_engine.Sampler(denoiser, solver="euler", nfe=3).run(2).images.isfinite().all()
    fractional = wrapped(plain)
    assert not torch.equal(wrapped(plain, steps="integer").amed_settings, fractional.amed_settings)
    with pytest.raises(ConfigError, match=r"no such row .*steps of torch\.int64"):
        wrapped(Embedded(100), steps="integer")
    for options in ({"steps": "whole"}, {"steps": "integer", "prediction": "flow"}):
        with pytest.raises(ConfigError, match="steps"):
            wrap(network, **({"prediction": "epsilon"} | options))


def test_classes_that_are_looked_up_are_told_by_number():
    network = Embedded(steps=0, classes=11)
    found, said = (wrapped(network, label_dim=10, **more) for more in ({}, {"labels": "index"}))
    assert "told as an index: rows were refused" in found.explain()
    labels = torch.tensor([3, 9])
    expected = wrapped(lambda x, t: network(x, t, labels[: len(x)]), verify=False)(X, SIGMA).x0
    for denoiser in (found, said, wrap(network, "epsilon", label_dim=10, labels="index")):
        torch.testing.assert_close(denoiser(X, SIGMA, labels).x0, expected)
    with pytest.raises(ConfigError, match='labels="index" tells it classes by number'):
        wrap(network, "epsilon", label_dim=10)(X, SIGMA, labels)
    with pytest.raises(ConfigError, match='labels="index" tells it classes by number'):
        wrapped(network, label_dim=10, labels="rows")


def test_guidance_needs_the_class_that_means_none():
    network = Embedded(steps=0, classes=11)
    with pytest.raises(ConfigError, match="null_class"):
        amed_engine.Sampler(wrapped(network, label_dim=10), solver="euler", nfe=2).run(2, 3, guidance_scale=2.0)
    guided = amed_engine.Sampler(wrapped(network, label_dim=10, null_class=10), solver="euler", nfe=2)
    assert guided.run(2, 3, guidance_scale=2.0).images.isfinite().all()
    with pytest.raises(ConfigError, match="no such row"):
        wrapped(Embedded(0, 10), label_dim=10, null_class=10)
    unseen = wrapped(Embedded(0, 10), label_dim=10, null_class=10, verify=False)
    small = amed_engine.Sampler(unseen, solver="euler", nfe=2)
    with pytest.raises(ConfigError, match="no such row"):
        small.run(2, 3, guidance_scale=2.0)


def test_a_table_of_one_row_more_than_classes_names_the_class_that_means_none():
    network = Embedded(steps=0, classes=11)
    told, sampler = wrapped(network, label_dim=10), amed_engine.Sampler(wrapped(network, label_dim=10), nfe=2)
    raw = Sized(label_dim=10)
    for ask in (
        lambda: ClassifierFree(told, 2.0),
        lambda: sampler.run(2, 3, guidance_scale=2.0),
        lambda: told(X, SIGMA),
        lambda: wrap(network, "epsilon", label_dim=10)(X, SIGMA, torch.tensor([3, 9])),
        lambda: amed_engine.Sampler(raw, shape=(3, 8, 8)),
        lambda: amed_engine.Sampler(raw, shape=(3, 8, 8), verify=False).run(2, 3),
    ):
        with pytest.raises(ConfigError, match=r"null_class=10 \(its table of classes has 11 rows, the last for none\)"):
            ask()
    with pytest.raises(ConfigError, match=r"null_class=\.\.\."):
        ClassifierFree(wrapped(Embedded(0, 10), label_dim=10), 2.0)


class Sized(Embedded):
    """One that says how many classes it has."""

    def __init__(self, label_dim: int):
        super().__init__(0, label_dim + 1)
        self.label_dim = label_dim


def test_a_denoiser_that_looks_steps_up_is_told_how_to_be_wrapped():
    with pytest.raises(ConfigError, match=r'denoisers are told noise levels \(.*steps="integer"'):
        amed_engine.Sampler(Embedded(), shape=(3, 8, 8))


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.classes = nn.Linear(10, 3)

    def forward(self, x, t, y):
        return x + self.classes(y)[:, :, None, None]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"label_dim": 9}, r"one-hot rows float32 \(8, 9\) among it: check shape, label_dim"),
        ({"label_dim": 10, "null_class": 10}, r"an index int64 \(2,\): labels=.rows. tells"),
        ({"label_dim": 10, "labels": "index"}, 'labels="rows" tells it one-hot rows'),
    ],
)
def test_labels_of_another_form_than_a_layer_takes_are_told(options, told):
    with pytest.raises(ConfigError, match=told):
        wrapped(Rows(), **options)


def test_samples_of_another_size_than_a_layer_takes_are_told():
    layer = nn.Conv2d(1, 1, 1)
    with pytest.raises(ConfigError, match=r"have 1 channels.*check shape$"):
        wrapped(lambda x, t: layer(x))


@pytest.mark.parametrize("read", [float, bool])
def test_a_network_of_one_time_for_all_is_told(read):
    with pytest.raises(ConfigError, match="one time for all samples"):
        wrapped(lambda x, t: x * read(t))


def test_another_error_of_a_network_says_what_it_was_told():
    denoiser = wrapped(lambda x, t: x + torch.cat([x, t], 1))
    with pytest.raises(RuntimeError) as caught:
        denoiser(X, SIGMA)
    assert "its time as float32 (2,); one that takes them otherwise" in "".join(caught.value.__notes__)


def test_levels_that_are_no_numbers_are_refused():
    with pytest.raises(ConfigError, match=r"levels must be the noise levels .* got 'geometric'"):
        wrap(plain, "score", shape=(3, 8, 8), levels="geometric")


@pytest.mark.parametrize("null_class", [-1, 11, 3.0, True])
def test_a_null_class_out_of_range_is_refused(null_class):
    with pytest.raises(ConfigError, match=r"null_class must be the index that means no class, 0 \.\. 10"):
        wrapped(Embedded(steps=0, classes=11), label_dim=10, null_class=null_class)


def test_rows_and_a_null_class_contradict_each_other():
    with pytest.raises(ConfigError, match='labels="rows" say it by zeros'):
        wrapped(Embedded(steps=0, classes=11), label_dim=10, null_class=10, labels="rows")
    with pytest.raises(ConfigError, match="label_dim must be the number of classes"):
        wrapped(plain, label_dim="10")


# ---- the score, told the index of a level


LEVELS = torch.logspace(0.7, -2, 10)


class Indexed(nn.Module):
    """The exact score of N(0, 0.5²), as NCSN has it."""

    def forward(self, x, index):
        assert index.dtype == torch.int64
        return -x / (LEVELS[index] ** 2 + 0.25).reshape(-1, 1, 1, 1)


def test_a_score_network_is_told_the_index_of_its_level(caplog):
    denoiser = wrap(Indexed(), "score", shape=(3, 8, 8), levels=LEVELS)
    assert (denoiser.sigma_min, denoiser.sigma_max) == pytest.approx((0.01, 10**0.7))
    for level in LEVELS:
        sigma = level.expand(2)
        torch.testing.assert_close(denoiser(X, sigma).x0, X * 0.25 / (0.25 + level**2), rtol=1e-4, atol=1e-5)
    assert not caplog.messages
    assert denoiser.half().family.levels.dtype == torch.float64
    rising = wrap(lambda x, i: Indexed()(x, 9 - i), "score", shape=(3, 8, 8), levels=LEVELS.flip(0))
    torch.testing.assert_close(rising(X, SIGMA).x0, wrap(Indexed(), "score", levels=LEVELS)(X, SIGMA).x0)
    images = amed_engine.Sampler(denoiser, solver="euler", schedule=LEVELS.double()).run(64).images
    assert images.std().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("levels", [[1.0], [1.0, 2.0, 1.5], [1.0, 0.0], [[1.0, 2.0]], [float("inf"), 1.0]])
def test_levels_that_are_no_table_are_refused(levels):
    with pytest.raises(ConfigError, match="levels must be the noise levels"):
        IndexedScore(levels)


def test_options_of_another_prediction_are_refused():
    with pytest.raises(ConfigError, match="levels are for prediction="):
        wrapped(plain, levels=LEVELS)
    with pytest.raises(ConfigError, match="which says all"):
        wrap(plain, IndexedScore(LEVELS), levels=LEVELS)


@pytest.mark.parametrize("told", [{"label_dim": 4, "null_class": 4}, {"label_dim": 5, "labels": "index"}])
def test_a_table_of_fewer_classes_than_are_told_is_refused_by_wrap(told):
    """Its last class and the one that means none are asked for, before any sampling."""

    class Four(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.table = nn.Conv2d(1, 1, 1), nn.Embedding(4, 1)

        def forward(self, x, t, y):
            return self.conv(x) + self.table(y)[:, :, None, None]

    with pytest.raises(ConfigError, match=r"no such row .*check label_dim and null_class"):
        amed_engine.wrap(Four(), "epsilon", shape=(1, 8, 8), **told)
    amed_engine.wrap(Four(), "epsilon", shape=(1, 8, 8), label_dim=3, null_class=3)
