"""The mean answer of a model: what is measured, how often the network is asked, and what becomes of it.

Tolerances of 1e-4: sigma_0 is not infinite, and the mean answer of data about m is (1 - 4e-5) m there.
"""

import dataclasses
import gc
import logging
import weakref

import pytest
import torch
from torch import nn

import amed_engine.zoo as zoo
from amed_engine import ConfigError, Mean, Plan, Sampler, load_predictor, make_plan, measure_mean, save_predictor, wrap
from amed_engine.adapters import Thresholded
from amed_engine.engine import measure
from amed_engine.engine.measure import EVALUATIONS, LATENTS

SHAPE = (2, 3, 3)
MEANS = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3)) * 4


class Classes(nn.Module):
    """Exact denoiser of N(m_k, 0.5²) for each class k, m_0 for none; counts the rows that it is asked about."""

    def __init__(self, classes: int = 0, can_guide: bool = True):
        super().__init__()
        self.means = nn.Parameter(MEANS[: 1 + min(classes, 4)].clone())
        self.sample_shape, self.label_dim, self.can_guide, self.rows = SHAPE, classes, can_guide, 0

    def forward(self, x, sigma, labels=None):
        self.rows += len(x)
        mean = self.means[:1]
        if labels is not None:
            known = labels[:, : len(self.means) - 1].to(x)
            mean = mean + torch.einsum("bk,kchw->bchw", known, self.means[1:] - mean)
        return mean + (x - mean) * 0.25 / (0.25 + sigma.view(-1, 1, 1, 1) ** 2)


@pytest.fixture(autouse=True)
def nothing_is_known():
    measure._known.clear()


def test_the_mean_of_gaussian_data_is_their_mean():
    model = Classes()
    mean = measure_mean(model)
    # Pairs z, -z: the answers' linear part cancels, and a Gaussian's has no other.
    torch.testing.assert_close(mean.rows(), MEANS[:1], rtol=1e-4, atol=1e-4)
    assert (model.rows, mean.latents, mean.classes, mean.sigma, mean.dtype) == (LATENTS, LATENTS, 0, 80.0, "float32")


@pytest.mark.parametrize("classes", [1, 4])
def test_each_class_has_a_mean_and_none_has_one(classes):
    model = Classes(classes)
    mean = measure_mean(model)
    torch.testing.assert_close(mean.rows(), MEANS[: 1 + classes], rtol=1e-4, atol=1e-4)
    assert model.rows == (1 + classes) * LATENTS


def test_where_no_class_is_unknown_to_the_network_it_is_not_asked():
    model = Classes(4, can_guide=False)
    mean = measure_mean(model)
    torch.testing.assert_close(mean.rows()[0], MEANS[1:].mean(0), rtol=1e-4, atol=1e-4)
    assert model.rows == 4 * LATENTS


@pytest.mark.parametrize("classes", [15, 16, 17, 1000])
def test_never_more_than_512_evaluations(classes):
    model = Classes(classes)
    mean = measure_mean(model)
    assert model.rows <= EVALUATIONS
    assert len(mean.rows()) == (1 + classes if classes <= 16 else 2)


def test_a_model_is_measured_once_and_again_where_its_weights_changed():
    model = Classes(1)
    first = measure_mean(model)
    asked = model.rows
    assert measure_mean(model) is first
    assert model.rows == asked
    with torch.no_grad():
        model.means += 1
    assert not torch.equal(measure_mean(model).rows(), first.rows())


class Constant(nn.Module):
    """Answers `value` everywhere; its one weight says nothing of it."""

    sample_shape = SHAPE

    def __init__(self, value, kept="attribute"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        if kept == "buffer":
            self.register_buffer("value", torch.tensor(value))
        else:
            self.value = {"default": value} if kept == "dictionary" else value

    def forward(self, x, sigma):
        value = self.value["default"] if isinstance(self.value, dict) else self.value
        return torch.zeros_like(x) + value


@pytest.mark.parametrize("kept", ["attribute", "buffer"])
def test_networks_of_the_same_weights_are_measured_each(kept):
    for value in (1.0, 2.0, 1, 2):
        assert measure_mean(Constant(value, kept)).rows().unique().tolist() == [value]


@pytest.mark.parametrize("kept", ["attribute", "buffer", "dictionary"])
def test_a_network_that_changed_is_measured_anew(kept):
    model = Constant(1.0, kept)
    first = measure_mean(model)
    assert measure_mean(wrap(model, "denoised", shape=SHAPE)).rows().unique().tolist() == [1.0]
    if kept == "dictionary":
        model.value["default"] = 3.0
    else:
        model.value = torch.tensor(3.0) if kept == "buffer" else 3.0
    assert measure_mean(model).rows().unique().tolist() == [3.0]
    hook = model.register_forward_hook(lambda module, inputs, answer: 2 * answer)
    assert measure_mean(model).rows().unique().tolist() == [6.0]
    hook.remove()
    model.register_forward_hook(lambda module, inputs, answer: 3 * answer)
    assert measure_mean(model).rows().unique().tolist() == [9.0]
    assert first.rows().unique().tolist() == [1.0]


def test_what_is_known_of_a_network_does_not_keep_it():
    model = Constant(1.0)
    seen = weakref.ref(model)
    measure_mean(model)
    del model
    gc.collect()
    assert seen() is None


def test_the_global_generators_are_untouched():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    measure_mean(Classes(17))
    assert torch.equal(torch.rand(3), expected)


def test_each_bound_condition_has_a_mean_of_its_own():
    class Prompted(nn.Module):
        """Told an embedding e, it draws N(e, 0.25); predicts the data themselves."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x, t, encoder_hidden_states):
            return self.weight * encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1).expand_as(x)

    texts = torch.arange(40.0).reshape(40, 1, 1).expand(40, 2, 3)
    bound = {
        "conditions": {"encoder_hidden_states": texts},
        "null_conditions": {"encoder_hidden_states": texts[:1] - 1},
    }
    model = wrap(Prompted(), "x0", shape=SHAPE, **bound)
    mean = measure_mean(model)
    assert mean.rows()[:, 0, 0, 0].tolist() == pytest.approx(list(range(-1, 40)))
    other = wrap(model.network, "x0", shape=SHAPE, conditions={"encoder_hidden_states": texts + 1})
    plan = make_plan(4, solver="euler", sigma_min=0.02, sigma_max=mean.sigma, mean=mean)
    assert Sampler(Thresholded(model), plan=plan, verify=False).plan == plan
    for network in (other, Thresholded(other)):
        with pytest.raises(ConfigError, match="measured on another model"):
            Sampler(network, plan=plan)


# ---- the sampler


def counted(model, **options):
    sampler = Sampler(model, solver="ipndm", **options)
    model.rows = 0
    return sampler


@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("nfe", [1, 3, 5])
def test_run_asks_the_network_exactly_nfe_times(classes, nfe):
    model = Classes(classes)
    sampler = counted(model, nfe=nfe, afs="mean")
    sampler.run(3)
    assert model.rows == 3 * nfe
    assert sampler.plan.intervals == nfe + 1


def test_without_being_asked_a_sampler_does_not_measure(caplog):
    model = Classes()
    with caplog.at_level(logging.INFO, "amed_engine"):
        sampler = Sampler(model, solver="ipndm", nfe=4, verify=False)
    assert (model.rows, sampler.plan.afs) == (0, False)
    assert len(caplog.messages) == 1
    assert 'afs="mean"' in caplog.messages[0]
    caplog.clear()
    Sampler(model, nfe=4, verify=False)
    assert (model.rows, len(caplog.messages)) == (0, 1)
    assert 'afs="mean"' in caplog.messages[0]


def test_one_evaluation_less_costs_nothing_on_data_that_are_not_about_zero():
    """Of unit variance, as an analytic step has them: what is left of its error is that of the mean."""

    class Wide(Classes):
        def forward(self, x, sigma, labels=None):
            return self.means + (x - self.means) / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    def error(**options):
        model = Wide()
        sampler = Sampler(model, solver="ipndm", schedule="polynomial", **options)
        x = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
        exact = MEANS[:1] + (x * 80 - MEANS[:1]) * ((1 + 0.002**2) / (1 + 80**2)) ** 0.5
        return (sampler.run(x).images - exact).square().mean().sqrt().item()

    zero, mean, longer = error(nfe=5, afs=True), error(nfe=5, afs="mean"), error(nfe=6, afs=False)
    assert mean == pytest.approx(longer, rel=0.05)
    assert zero > 1.3 * mean


@pytest.mark.parametrize("scale", [None, 1.0, 2.5])
def test_each_sample_starts_about_the_mean_of_its_class_under_guidance(scale):
    """On one interval the images follow from the first step alone."""
    sampler = Sampler(Classes(4), solver="euler", nfe=None, schedule=torch.tensor([80.0, 10.0]), afs="mean")
    labels = torch.tensor([2, 0, 3])
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    images = sampler.run(x, labels, guidance_scale=scale).images
    m = MEANS[:1] + (1 if scale is None else scale) * (MEANS[1 + labels] - MEANS[:1])
    expected = x * 80 + (10 - 80) * (x * 80 - m) / (1 + 80.0**2) ** 0.5
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


def test_a_caller_s_autocast_does_not_round_the_mean():
    sampler = Sampler(Classes(4), solver="euler", schedule=torch.tensor([80.0, 10.0]), afs="mean")
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = sampler.run(x, [2, 0, 3]).images
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sampler.run(x, [2, 0, 3]).images, expected)


def test_a_mean_travels_in_plan_and_predictor_files(tmp_path, tiny_model):
    sampler = Sampler(tiny_model, solver="dpmpp", nfe=4, afs="mean")
    expected = sampler.run([0, 1, 2]).images
    sampler.plan.save(tmp_path / "plan.json")
    measure._known.clear()
    again = Sampler(tiny_model, plan=tmp_path / "plan.json")
    assert not measure._known
    assert torch.equal(again.run([0, 1, 2]).images, expected)


def test_a_mean_travels_with_a_predictor(tmp_path, tiny_model):
    from amed_engine import ConstantPredictor

    plan = make_plan(5, solver="amed", afs="mean", mean=measure_mean(tiny_model))
    predictor = ConstantPredictor(plan.intervals)
    predictor.plan = plan
    save_predictor(predictor, tmp_path / "p.safetensors")
    again = load_predictor(tmp_path / "p.safetensors")
    assert again.plan == plan
    expected = Sampler(tiny_model, predictor).run([0, 1]).images
    assert torch.equal(Sampler(tiny_model, tmp_path / "p.safetensors").run([0, 1]).images, expected)


def test_a_plan_without_one_is_measured_when_it_runs():
    model = Classes()
    plan = make_plan(5, solver="ipndm", afs="mean")
    assert "AFS about the mean, NFE 5" in plan.describe()
    sampler = Sampler(model, plan=plan)
    assert sampler.plan.mean is not None
    assert "mean of 32 latents" in sampler.plan.describe()
    assert dataclasses.replace(sampler.plan, mean=None) == plan


def test_the_zoo_brings_its_own(monkeypatch):
    monkeypatch.setattr(measure, "_measured", None)
    sampler = Sampler("digits", solver="ipndm", nfe=5)
    assert (sampler.plan.afs, sampler.plan.mean) == ("mean", zoo.bundled_mean("digits"))
    assert Sampler("digits", solver="ipndm", nfe=5, afs=False).plan.mean is None
    # Measured in float32: not for other arithmetic, or other noise levels.
    assert Sampler("digits", solver="ipndm", nfe=5, autocast=torch.bfloat16).plan.afs is False
    assert Sampler("digits", solver="ipndm", nfe=5, sigma_max=40.0).plan.afs is False


def test_the_zoo_s_own_is_what_would_be_measured():
    bundled, measured = zoo.bundled_mean("digits"), measure_mean("digits")
    assert bundled is not None
    torch.testing.assert_close(bundled.rows(), measured.rows(), rtol=1e-4, atol=1e-4)
    assert dataclasses.replace(bundled, data=measured.data) == measured


# ---- what is refused


@pytest.mark.parametrize(("classes", "shape"), [(0, (1, 1024, 1025)), (4, (1, 1024, 513))])
def test_a_mean_that_is_too_large_to_keep_costs_no_evaluation(classes, shape):
    def never(x, sigma, labels=None):
        raise AssertionError("the network ran")

    for work in (measure_mean, lambda model, **facts: Sampler(model, afs="mean", **facts)):
        with pytest.raises(ConfigError, match="numbers, more than the 1048576 that are kept; pass another afs"):
            work(never, shape=shape, label_dim=classes)


def test_labels_are_as_contiguous_as_compiled_models_ask_for():
    class Strict(Classes):
        def forward(self, x, sigma, labels):
            assert x.is_contiguous()
            assert sigma.is_contiguous()
            assert labels.is_contiguous()
            return super().forward(x, sigma, labels)

    assert measure_mean(Strict(3)) is not None


def test_a_model_without_a_shape_cannot_be_measured():
    with pytest.raises(
        ConfigError, match=r"does not say what shape its samples have; pass shape=\(C, H, W\), or another afs"
    ):
        Sampler(lambda x, sigma: x / 2, solver="euler", afs="mean")


def test_another_model_s_mean_is_refused():
    plan = make_plan(5, solver="euler", mean=measure_mean(Classes()))
    other = Classes()
    with torch.no_grad():
        other.means += 1
    with pytest.raises(ConfigError, match="was measured on another model, or in another dtype"):
        Sampler(other, plan=plan)
    assert Sampler(other, plan=plan, verify=False).plan == plan
    with pytest.raises(ConfigError, match="is for 0 classes, the model has 4; measure it anew"):
        Sampler(Classes(4), plan=plan)


def test_latents_of_another_shape_than_the_mean_are_refused():
    def model(x, sigma):
        return x / 2

    mean = Mean.of(torch.zeros(1, *SHAPE), classes=0, sigma=80.0, latents=1)
    sampler = Sampler(model, plan=make_plan(5, solver="euler", mean=mean))
    assert sampler.run(torch.zeros(1, *SHAPE)).images.shape == (1, *SHAPE)
    with pytest.raises(ConfigError, match=r"about a mean answer of shape \(2, 3, 3\), got latents of \(2, 4, 4\)"):
        sampler.run(torch.zeros(1, 2, 4, 4))


def test_answers_that_are_not_finite_are_refused():
    with pytest.raises(ConfigError, match="the model's answers at sigma 80 are not finite"):
        measure_mean(lambda x, sigma: x * float("nan"), shape=SHAPE)


def test_an_old_plan_has_no_mean():
    old = {"solver": "euler", "sigmas": [80.0, 1.0], "afs": True}
    model = Classes()
    sampler = Sampler(model, plan=Plan.from_json(old), verify=False)
    assert (sampler.plan.afs, sampler.plan.mean, model.rows) == (True, None, 0)
