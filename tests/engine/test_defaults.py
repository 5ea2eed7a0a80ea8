"""torch's default dtype and device are the caller's: what is sampled, trained and loaded is the same under any."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import amed_engine
import amed_engine.zoo as zoo
from amed_engine import Sampler, load, load_package, make_schedule, make_solver, sample, wrap
from amed_engine.adapters import ClassifierFree, ClassifierGuided
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.evaluation.metrics.classifier import load_classifier
from amed_engine.integrations.k_diffusion import sample_amed
from amed_engine.solvers.stage import Midpoint
from amed_engine.zoo.train_digits import load_digits

SHAPE = (3, 8, 8)
FIT = {"nfe": 3, "samples": 8, "batch": 8, "starts": 1, "early": 1, "late": 1, "progress": False}
DISTILL = {"nfe": 4, "total_kimg": 0.016, "batch": 8, "progress": False}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.middle_block, self.label = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x, t, labels=None):
        answer = 0.1 * self.middle_block(x)
        return answer if labels is None else answer + self.label(labels)[:, :, None, None]


NETWORK, CLASSIFIER = Small(), nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten())
LATENTS, LEVELS = torch.randn(2, *SHAPE), torch.tensor([80.0, 10.0, 1.0, 0.1])


def plain():
    return wrap(NETWORK, "epsilon", shape=SHAPE)


def labelled():
    return wrap(NETWORK, "epsilon", shape=SHAPE, label_dim=2)


def numbers(module):
    return torch.cat([tensor.detach().double().flatten() for tensor in module.state_dict().values()])


def run(model, solver="ipndm", **options):
    return Sampler(model, solver=solver, nfe=4, **options)


TASKS = {
    "bundled": lambda: Sampler("digits").run([0, 1]).images,
    "float64": lambda: run(plain(), dtype=torch.float64).run([0, 1]).images,
    "mean": lambda: run(labelled(), "unipc", afs="mean").run([0, 1], class_labels=[0, 1]).images,
    "guided": lambda: run(ClassifierFree(labelled(), 2.0)).run(LATENTS, class_labels=1).images,
    "classifier": lambda: (
        run(ClassifierGuided(labelled(), lambda x, t: CLASSIFIER(x), 1.0)).run([0], class_labels=1).images
    ),
    "v": lambda: run(wrap(NETWORK, "v", shape=SHAPE)).run([0]).images,
    "sample": lambda: sample(plain(), 80 * LATENTS, LEVELS, make_solver("deis")),
    "levels": lambda: make_schedule("polynomial", 5, 0.002, 80.0),
    "a list": lambda: sample(plain(), 80 * LATENTS, [80.0, 10.0, 0.1], make_solver("euler")),
    "k-diffusion": lambda: sample_amed(plain(), 80 * LATENTS, LEVELS, predictor=[Midpoint(0.5)] * 3, disable=True),
    "weights": lambda: numbers(load("digits")),
    "judge": lambda: numbers(load_classifier()[0]),
    "predictor": lambda: numbers(zoo.bundled_predictor("digits", 4)),
    "fit": lambda: numbers(amed_engine.fit(plain(), variant="adaptive", **FIT)),
    "constants": lambda: numbers(amed_engine.fit(plain(), variant="epd", **FIT)),
    "distill": lambda: numbers(amed_engine.distill(labelled(), **DISTILL)),
    "noise levels": lambda: (
        amed_engine.distill(plain(), objective="end_to_end", learn_sigmas=True, **DISTILL).plan.levels
    ),
    "calibrate": lambda: torch.tensor(
        [row.rmse for row in amed_engine.calibrate(plain(), 4, progress=False).rows], dtype=torch.float64, device="cpu"
    ),
    "digits": lambda: load_digits(torch.device("cpu")).images,
    "search": lambda: amed_engine.search_schedule(plain(), nfe=4, samples=8, grid=12, progress=False),
}


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device():
    """Where no other device is, one on which nothing can be looked at."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("default", [default_dtype, default_device, lambda: torch.device("meta")])
@pytest.mark.parametrize("task", TASKS)
def test_defaults_change_nothing(task, default):
    expected = TASKS[task]()
    with default():
        got = TASKS[task]()
    assert (got.dtype, got.device) == (expected.dtype, expected.device)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("default", [default_dtype, default_device])
def test_a_file_is_read_under_any_default(default, tmp_path):
    sampler = Sampler(wrap(NETWORK, "epsilon", shape=SHAPE, bottleneck=None), solver="euler", nfe=2)
    sampler.export(tmp_path / "loop.pt2", "exported")
    with default():
        images = load_package(tmp_path / "loop.pt2").run(LATENTS).images
    torch.testing.assert_close(images, sampler.run(LATENTS).images)


@pytest.mark.parametrize("default", [default_dtype, default_device])
def test_a_model_is_itself_under_any_default(default):
    expected = fingerprint(load("digits"))
    with default():
        assert fingerprint(load("digits")) == expected
        assert torch.get_default_dtype() == (torch.float64 if default is default_dtype else torch.float32)
