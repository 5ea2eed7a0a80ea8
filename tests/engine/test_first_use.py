"""What a newcomer meets: mistakes of the first hour are told apart from results, and objects print as a line."""

import copy
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from amed_engine import (
    AMEDPredictor,
    ConfigError,
    FileFormatError,
    Sampler,
    Stepper,
    distill,
    fit,
    load_package,
    make_plan,
    make_schedule,
    read_plan,
    save_predictor,
    wrap,
    write_plan,
)

SHAPE = (3, 8, 8)


def gaussian(x, sigma):
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def euler(model=gaussian, **options) -> Sampler:
    return Sampler(model, **{"solver": "euler", "nfe": 2, "shape": SHAPE, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver_options": ["max_order"]}, "solver_options must be a dict"),
        ({"rho": 3, "schedule": "logsnr"}, "rho=3 is the exponent of the other schedules"),
        ({"rho": 3, "schedule": torch.tensor([9.0, 3.0, 1.0])}, "leave it out"),
        ({"sigma_min": -1.0}, "sigma_min must be a noise level"),
        ({"sigma_max": "80"}, "sigma_max must be a noise level"),
        ({"label_dim": "10"}, "label_dim must be the number of classes"),
        ({"dtype": "float32"}, "got 'float32'"),
        ({"autocast": "bfloat16"}, "got 'bfloat16'"),
        ({"batch_sizes": 8}, "batch_sizes must be positive integers"),
        ({"batch_sizes": (0,)}, "batch_sizes must be positive integers"),
        ({"compile": "fast"}, "compile must be 'default'"),
        ({"compile": True}, "compile must be 'default'"),
        ({"memory_format": "channels_last"}, "memory_format must be"),
        ({"nfe": 2.0}, "nfe must be a positive integer"),
        ({"solver": "amed"}, "amed_engine.fit or distill"),
        ({"model": nn.Conv2d}, "is the class Conv2d"),
    ],
)
def test_options_that_cannot_work_are_refused_when_the_sampler_is_made(options, message):
    with pytest.raises(ConfigError, match=message):
        euler(**options)


def test_classes_that_contradict_the_model_are_refused_and_none_at_all_are_not():
    with pytest.raises(ConfigError, match="10 classes, got label_dim=9"):
        Sampler("digits", label_dim=9)
    assert Sampler("digits", label_dim=0).run(1).labels is None


def test_torchscript_is_not_compiled():
    with pytest.raises(ConfigError, match="TorchScript"):
        euler(torch.jit.trace(gaussian, (torch.zeros(1, *SHAPE), torch.ones(1))), compile="default")


def test_integers_of_numpy_count_evaluations():
    assert euler(nfe=np.int64(3)).nfe == 3
    assert type(euler(nfe=np.int64(3)).plan.afs) is bool


@pytest.mark.parametrize("level", [np.float32(3), np.float64(3), torch.tensor(3.0), 3])
def test_numbers_of_numpy_and_torch_are_noise_levels(level):
    assert euler(sigma_max=level).plan.sigmas[0] == pytest.approx(3)


def test_a_state_dict_is_refused_with_what_to_do_instead(tmp_path):
    torch.save(nn.Conv2d(3, 3, 1).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="load it into its network and pass that") as caught:
        euler(str(tmp_path / "weights.pt"))
    assert "miniz" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, _: x.long(), "floating point"),
        (lambda x, _: x.to(torch.complex64), "floating point"),
        (lambda x, _: x.to("meta"), "where its input is"),
        (lambda x, _: (x, 3), "tuple of Tensor, int"),
    ],
)
def test_answers_that_are_no_estimate_of_the_image_are_refused(answer, message):
    with pytest.raises(ConfigError, match=message):
        euler(answer).run(1)


class Raw(nn.Module):
    """Takes one argument more than a denoiser, as most networks of other libraries do."""

    def forward(self, x, step, prompt):
        return x


@pytest.mark.parametrize("network", [Raw(), nn.Conv2d(3, 3, 1, dtype=torch.bfloat16).forward, lambda x: x])
def test_an_error_of_the_network_says_how_it_was_called(network):
    with pytest.raises((TypeError, RuntimeError)) as caught:
        euler(network).run(2)
    assert "x float32 (2, 3, 8, 8), sigma float32 (2,); a raw network becomes a" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ([1], {"generator": torch.Generator()}, "no say in seeds or latents"),
        (torch.zeros(1, *SHAPE), {"generator": torch.Generator()}, "no say in seeds or latents"),
        (1, {"callback": 3}, "callback must be a function"),
        (2, {"out": torch.empty(2, *SHAPE, requires_grad=True)}, "must not require gradients"),
        (2, {"out": torch.empty(1, *SHAPE).expand(2, *SHAPE)}, "expanded view"),
    ],
)
def test_arguments_of_a_run_that_would_be_ignored_or_fail_late_are_refused(batch, options, message):
    with pytest.raises(ConfigError, match=message):
        euler().run(batch, **options)


def test_a_list_of_latents_is_refused_in_a_short_sentence():
    with pytest.raises(ConfigError, match="seeds must be integers") as caught:
        euler().run(cast(Any, [torch.zeros(SHAPE)]))
    assert len(str(caught.value)) < 120


def test_a_guidance_of_zero_is_not_the_guidance_a_predictor_was_trained_without(caplog):
    sampler = Sampler("digits", nfe=5)
    assert sampler.run([0], 3, guidance_scale=1.0).plan == sampler.plan  # D_u + 1 (D_c - D_u) = D_c
    assert sampler.run([0], 3, guidance_scale=0.0).plan != sampler.plan
    assert "not for guidance_scale=0.0" in caplog.text


def test_a_bundled_predictor_does_not_hide_a_bad_nfe():
    with pytest.raises(ConfigError, match="nfe must be a positive integer, got 0"):
        Sampler("digits", nfe=0)


def test_a_range_that_is_asked_for_is_sampled_over(caplog):
    for low, high in ((0.002, 80.0), (0.01, 500.0), (4e-5, 1.6)):
        sigmas = euler(sigma_max=high, sigma_min=low).plan.sigmas
        assert (sigmas[-1], sigmas[0]) == (pytest.approx(low), pytest.approx(high))
    assert not caplog.records


def test_a_model_s_own_range_is_sampled_over_and_a_plan_that_leaves_some_of_it_warns(caplog):
    class Wide(nn.Module):
        sigma_min, sigma_max = 0.06, 2560.0

        def forward(self, x, sigma):
            return gaussian(x, sigma)

    assert Sampler(Wide(), solver="euler", shape=SHAPE).plan.sigmas[0] == pytest.approx(2560)
    Sampler(Wide(), solver="euler", shape=SHAPE, sigma_max=80.0)
    Sampler(Wide(), solver="euler", shape=SHAPE, schedule=torch.tensor([80.0, 1.0]))
    assert not caplog.records
    for model in (Wide(), nn.DataParallel(Wide())):
        caplog.clear()
        Sampler(model, plan=make_plan(5, solver="euler", sigma_min=0.06), shape=SHAPE)
        assert (
            "the model's noise levels are 2560 to 0.06, this plan's 80 to 0.06: what lies outside is left out"
            in caplog.text
        )


@pytest.mark.parametrize(
    "asked", [{"sigma_max": 2000.0}, {"schedule": torch.tensor([2000.0, 1.0])}], ids=["range", "levels"]
)
def test_noise_levels_above_the_model_s_own_warn(caplog, asked):
    """Told 1250 of 1000 steps, a network of discrete ones answers anything."""
    model = wrap(lambda x, t: x, "epsilon", shape=SHAPE, verify=False)
    Sampler(model, solver="euler", sigma_max=157.4)
    assert not caplog.records
    Sampler(model, solver="euler", **asked)
    assert "the model's noise levels end at 157.407, this plan's begin at 2000: the network is told" in caplog.text


@pytest.mark.parametrize("own", [True, -1.0, float("nan"), "80", [1.0, 2.0]])
def test_noise_levels_of_a_model_that_are_none_are_refused(own):
    class Told(nn.Module):
        sigma_max = own

        def forward(self, x, sigma):
            return gaussian(x, sigma)

    with pytest.raises(
        ConfigError, match=r"the model's sigma_max must be a noise level.*pass sigma_max= to the Sampler"
    ):
        Sampler(Told(), solver="euler", shape=SHAPE)
    assert Sampler(Told(), solver="euler", shape=SHAPE, sigma_max=40.0).plan.sigmas[0] == pytest.approx(40)


def test_seeds_give_the_same_images_whatever_the_default_dtype_and_device():
    sampler = Sampler("digits", nfe=5)
    expected = sampler.run([3, 4])
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            again = sampler.run([3, 4])
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.labels is not None
    assert expected.labels is not None
    assert torch.equal(again.labels, expected.labels)
    assert torch.equal(again.images, expected.images)


def test_samplers_and_results_print_as_one_line_and_copies_too():
    sampler = Sampler("digits", nfe=5)
    assert repr(copy.deepcopy(sampler)) == repr(sampler)
    assert repr(sampler) == f"Sampler(digits, {sampler.plan.describe()}, backend auto on cpu)"
    printed = repr(sampler.run(2, 3))
    assert printed.startswith("SampleResult(images (2, 1, 8, 8) float32, ")
    assert "backend eager" in printed
    assert "\n" not in printed
    assert len(printed) < 200


def test_plans_packages_and_steppers_print_as_one_line(tmp_path):
    predictor = AMEDPredictor(bottleneck=(4, 4))
    predictor.plan = make_plan(5, solver="amed")
    plan = write_plan(euler(predictor=predictor, solver=None, nfe=None), tmp_path / "plan.json")  # 9,000 weights
    assert repr(plan) == f"Tableau({predictor.plan.describe()}, shape (3, 8, 8))"
    stepper = Stepper(plan, np.zeros((2, *SHAPE), np.float32))
    assert repr(stepper) == f"Stepper({plan!r}, evaluation 1 of {len(plan.evaluations)}, x float32 (2, 3, 8, 8))"
    euler().export(tmp_path / "loop.pt2", "exported", verify=False)
    package = load_package(tmp_path / "loop.pt2")
    assert repr(package) == f"Package(exported, {euler().plan.describe()}, shape (3, 8, 8), batches to 256, cpu)"


def test_a_stepper_wants_a_plan_not_its_file_and_says_when_its_result_is_there(tmp_path):
    plan = write_plan(euler(), tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="what read_plan returns, got str"):
        Stepper(cast(Any, str(tmp_path / "plan.json")), np.zeros((1, *SHAPE), np.float32))
    with pytest.raises(ConfigError, match=r"no result yet; `advance` it .* until \.done is True"):
        _ = Stepper(plan, np.zeros((1, *SHAPE), np.float32)).result


def test_a_file_of_another_kind_is_refused_with_whole_names(tmp_path):
    euler().export(tmp_path / "schedule.json", "schedule")
    with pytest.raises(FileFormatError, match=r"missing evaluations, guidance_scale, nfe \.\.\., expected exactly"):
        read_plan(tmp_path / "schedule.json")


FEW: dict[str, Any] = {"samples": 8, "starts": 1, "early": 0, "late": 1, "progress": False, "shape": SHAPE}
BRIEF: dict[str, Any] = {"total_kimg": 0.016, "batch": 16, "progress": False, "shape": SHAPE}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit(lambda x, _: x * float("nan"), nfe=3, **FEW), "answers at sigma 80 are not finite"),
        (lambda: fit(lambda x, _: x * float("nan"), nfe=3, afs=False, **FEW), "teacher's samples are not finite"),
        (lambda: fit(gaussian, nfe=[], **FEW), "nfe is empty"),
        (lambda: fit(gaussian, **{**FEW, "nfe": 5.0}), r"nfe must be a positive integer, got 5\.0"),
        (
            lambda: distill(gaussian, **{**BRIEF, "loss": "mse"}),
            r"loss must be a function \(x, target\) -> \(B,\), got 'mse'",
        ),
        (
            lambda: distill(gaussian, loss=lambda x, y: (x - y).square().sum(), **BRIEF),
            r"shape \(16,\), got shape \(\)",
        ),
        (lambda: distill(gaussian, **{**BRIEF, "loss": lambda x, y: 1.0}), r"shape \(16,\), got float"),
        (lambda: make_schedule("logsnr", cast(Any, "5"), 0.1, 1.0), "at least 2 .*got '5'"),
        (lambda: save_predictor(AMEDPredictor(bottleneck=(4, 4)), "p.pt"), r"name it p\.safetensors"),
        (lambda: save_predictor(cast(Any, nn.Conv2d(3, 3, 1)), "p.safetensors"), "got Conv2d"),
    ],
)
def test_training_and_saving_refuse_what_would_be_lost_work(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        make()
    assert not list(tmp_path.iterdir())


def test_fitted_predictors_print_their_plan():
    predictor = fit(gaussian, **{**FEW, "nfe": np.int64(3)})
    assert repr(predictor).startswith("CoefficientPredictor(nonstationary + predictor, custom, ")
