"""Trajectories of the published implementation, and a few of our own for machines that do not have those."""

import json
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from amed_engine import AMEDPredictor, make_schedule, make_solver, sample
from amed_engine.solvers import SOLVERS

DATA = Path(__file__).parents[1] / "data"
# What has a case in tests/data/cases.json, whose trajectory is in goldens.safetensors.
RECORDED = sorted({case["solver"] for case in json.loads((DATA / "cases.json").read_text())})


class Mixture:
    """Posterior mean of a mixture of isotropic Gaussians, with a stand-in bottleneck: the denoiser of the goldens."""

    def __init__(self, tensors: dict[str, Tensor], dtype: torch.dtype):
        self.means, self.stds, self.weights, self.tap = (
            tensors[k].to(dtype) for k in ("means", "stds", "weights", "tap")
        )

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        flat, means = x.flatten(1), self.means.flatten(1)
        v = self.stds**2 + sigma[:, None] ** 2  # (B, K)
        distance = (flat[:, None] - means).square().sum(2)
        p = torch.softmax(self.weights.log() - distance / (2 * v) - flat.shape[1] / 2 * v.log(), 1)
        s = self.stds**2 / v
        denoised = ((p * (1 - s)) @ means + (p * s).sum(1, keepdim=True) * flat).view_as(x)
        return denoised, torch.einsum("fc,bchw->bfhw", self.tap, denoised.tanh())


@cache
def load(folder: Path) -> tuple[list[dict], dict[str, Tensor]]:
    return json.loads((folder / "cases.json").read_text()), load_file(folder / "goldens.safetensors")


def predictor_of(case: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> AMEDPredictor | None:
    if case["predictor"] is None:
        return None
    config = case["predictor"]
    prefix = f"predictor/{config['weights']}/"
    predictor = AMEDPredictor(scale_dir=config["scale_dir"], scale_time=config["scale_time"]).to(dtype)
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    predictor.load_state_dict(weights, strict=True)
    return predictor


@torch.no_grad()
def run(case: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    sigmas = make_schedule(
        case["schedule"],
        case["num_steps"],
        case["sigma_min"],
        case["sigma_max"],
        case["rho"],
        tensors.get("alphas_cumprod"),
    )
    known = {f.name for f in fields(SOLVERS[case["solver"]])}
    # The published implementation thresholds every data prediction; its own cases do not name what is no option there.
    options = {"thresholding": True} if "thresholding" in known and case["predict_x0"] else {}
    solver = make_solver(
        case["solver"], **options, **{name: case[name] for name in known - set(options) if name in case}
    )
    return sample(
        Mixture(tensors, dtype),
        tensors["latents"].to(dtype) * sigmas[0].to(dtype),
        sigmas,
        solver,
        predictor_of(case, tensors, dtype),
        afs=case["afs"],
        denoise_to_zero=case["denoise_to_zero"],
        trajectory=True,
    )


def error_per_state(got: Tensor, expected: Tensor) -> Tensor:
    """Largest deviation of each state relative to that state's largest value."""
    assert got.shape == expected.shape
    return (got - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)


def check(case: dict, tensors: dict[str, Tensor]) -> None:
    expected = tensors[case["case"]]
    error = error_per_state(run(case, tensors, torch.float64), expected)
    if case["solver"] == "deis":
        # The published coefficients are a Riemann sum of 10,000 points; ours are integrated to rounding.
        assert (run(case, tensors, torch.float64) - expected).norm() / expected.norm() < 1e-4, case
        assert error[-1] < 1e-2, case
    else:
        assert error.max() < 1e-8, case
    single = run(case, tensors, torch.float32).double()
    # Relative to the trajectory: the mixture itself, in float32, moves small states by more than any solver does.
    assert (single - expected).abs().max() / expected.abs().max() < 1e-4, case


@pytest.mark.parametrize("solver", RECORDED)
def test_published_trajectories(solver, goldens_dir):
    cases, tensors = load(goldens_dir)
    mine = [case for case in cases if case["solver"] == solver]
    assert mine
    for case in mine:
        check(case, tensors)


@pytest.mark.parametrize("solver", RECORDED)
def test_recorded_trajectories(solver):
    cases, tensors = load(DATA)
    mine = [case for case in cases if case["solver"] == solver]
    assert mine
    for case in mine:
        assert error_per_state(run(case, tensors, torch.float64), tensors[case["case"]]).max() < 1e-10, case


def test_every_integrator_has_a_recorded_trajectory():
    integrators = {name for name, solver in SOLVERS.items() if solver.integrates}
    assert set(RECORDED) == integrators - {"nonstationary"}  # whose coefficients are all a predictor's


def test_schedules_equal_the_published_ones(goldens_dir):
    _, tensors = load(goldens_dir)
    names = [name for name in tensors if name.startswith("schedule/")]
    assert len(names) > 20
    for name in names:
        _, schedule, rho, count = name.split("/")
        low, high = (0.029167158151720367, 14.614641229333643) if schedule == "discrete" else (0.002, 80.0)
        levels = make_schedule(
            schedule, int(count), low, high, None if rho == "None" else float(rho), tensors["alphas_cumprod"]
        )
        torch.testing.assert_close(levels, tensors[name], rtol=1e-10, atol=0)
