"""Schedule "discrete" is spaced over the network's own training steps."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import amed_engine
from amed_engine import ConfigError, Plan, Sampler, make_schedule
from amed_engine.adapters import ClassifierFree, Thresholded, alphas_cumprod, save_program, wrap
from amed_engine.adapters.discrete import alphas_of
from amed_engine.engine.resolve import resolve
from amed_engine.evaluation.comparison import Setting, compare

SHAPE = (1, 8, 8)


def network(x, time, *labels):
    return 0.1 * x


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, time):
        return self.layer(x) * (1 + time.reshape(-1, 1, 1, 1) / 1000)


def wrapped(betas, **options):
    return wrap(network, "epsilon", betas=betas, shape=SHAPE, **options)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_its_levels_are_those_of_the_networks_own_betas(betas):
    denoiser, table = wrapped(betas), alphas_cumprod(betas)
    for rho in (None, 2.0):
        plan = Sampler(denoiser, solver="ipndm", nfe=5, schedule="discrete", rho=rho).plan
        ends = denoiser.sigma_min, denoiser.sigma_max
        torch.testing.assert_close(plan.levels, make_schedule("discrete", 6, *ends, rho, table), rtol=1e-9, atol=0)
        assert (plan.schedule, plan.rho) == ("discrete", rho)


def test_steps_of_any_number_and_within_guidance():
    table = alphas_cumprod("linear", steps=50)
    denoiser = wrap(network, "v", betas=table, shape=SHAPE, label_dim=3, verify=False)
    for each in (denoiser, Thresholded(denoiser), ClassifierFree(denoiser, 2.0)):
        torch.testing.assert_close(alphas_of(each), table, rtol=1e-12, atol=0)
        levels = Sampler(each, solver="euler", nfe=49, schedule="discrete", afs=False).plan.levels
        torch.testing.assert_close(levels.flip(0), ((1 - table) / table).sqrt(), rtol=1e-6, atol=0)


def test_a_saved_network_has_its_steps(tmp_path):
    denoiser = wrap(Small(), "epsilon", betas="cosine", shape=SHAPE)
    opened = resolve(save_program(denoiser, tmp_path / "a.pt2", max_batch=4)).network
    torch.testing.assert_close(alphas_of(opened), alphas_of(denoiser))


@pytest.mark.parametrize("prediction", ["flow", "edm", "vp", "iddpm", "denoised"])
def test_a_network_without_steps_is_refused(prediction):
    denoiser = wrap(network, prediction, shape=SHAPE)
    for schedule in ({"solver": "ipndm"}, {}):
        with pytest.raises(
            ConfigError, match="spaced over the training steps of a network, and this one is known to have none"
        ):
            Sampler(denoiser, schedule="discrete", nfe=3, **schedule)
    with pytest.raises(ConfigError, match="known to have none"):
        Sampler(network, schedule="discrete", nfe=3, shape=SHAPE)


def test_a_plan_on_other_betas_is_refused(tmp_path):
    plan = Sampler(wrapped("linear"), solver="ipndm", nfe=5, schedule="discrete").plan
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["schedule"] == "discrete"
    assert Sampler(wrapped("linear"), plan=tmp_path / "plan.json").plan == Plan.load(tmp_path / "plan.json") == plan
    shorter = make_schedule("discrete", 6, 0.02, 100.0, alphas_cumprod=alphas_cumprod("linear"))
    own = replace(plan, sigmas=tuple(shorter.tolist()))
    Sampler(wrapped("linear"), plan=own)  # of a part of its range
    other = wrapped("cosine")
    with pytest.raises(
        ConfigError, match=r"on schedule 'discrete' of other betas: between 100 and 0.02 the model's 1000 steps"
    ):
        Sampler(other, plan=own)
    assert Sampler(other, plan=own, verify=False).plan == own
    assert Sampler(wrap(network, "flow", shape=SHAPE), plan=own).plan == own  # levels are levels


def test_compare_distill_and_calibrate_take_it():
    denoiser = wrap(Small(), "epsilon", betas="cosine", shape=SHAPE)
    found = compare(denoiser, 3, seeds=[0], samples=2, curve_samples=0, setting=Setting(schedule="discrete"))
    assert all(", discrete, " in row.plan for row in found.rows)
    options = {"schedule": "discrete", "total_kimg": 0.008, "batch": 8, "progress": False}
    predictor = amed_engine.distill(denoiser, nfe=3, teacher_schedule="discrete", **options)
    expected = make_schedule(
        "discrete",
        len(predictor.plan.sigmas),
        denoiser.sigma_min,
        denoiser.sigma_max,
        predictor.plan.rho,
        alphas_of(denoiser),
    )
    torch.testing.assert_close(predictor.plan.levels, expected, rtol=1e-6, atol=0)
    assert Sampler(denoiser, predictor).run(2).images.isfinite().all()
    with pytest.raises(ConfigError, match="known to have none"):
        amed_engine.distill(wrap(Small(), "edm", shape=SHAPE), nfe=3, **options)
    calibration = amed_engine.calibrate(denoiser, 2, batch=16, progress=False)
    assert any("discrete" in row for row in calibration.table().splitlines())
