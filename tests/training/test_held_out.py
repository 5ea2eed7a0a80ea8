"""What training says of itself: on latents that were not learned from, beside the solvers that need no predictor."""

import logging

import pytest
import torch

from amed_engine import Sampler, distill, fit
from amed_engine.engine.seeds import draw
from amed_engine.solvers.plan import best_training_free, make_plan

SHAPE = (1, 4, 4)
CENTRES = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5)) * 0.8
WIDTH = 0.1


def mixture(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser of two Gaussians of standard deviation WIDTH: their posterior means, weighed by probability."""
    variance = (WIDTH**2 + sigma**2).reshape(-1, 1, 1, 1)
    centres = CENTRES.to(x)
    distance = (x[:, None] - centres).square().flatten(2).sum(2)
    weights = torch.softmax(-distance / (2 * variance.flatten(1)), dim=1)
    share = WIDTH**2 / variance
    return share * x + (1 - share) * torch.einsum("bk,kchw->bchw", weights, centres)


def rmse_of(**given) -> float:
    """To a finer solution, on latents of neither."""
    z, _ = draw(range(1000, 1256), SHAPE, 0)
    fine = make_plan(64, solver="deis", options={"max_order": 4}, schedule="polynomial", rho=7.0, afs=False)
    exact = Sampler(mixture, plan=fine, shape=SHAPE).run(z).images
    return (Sampler(mixture, shape=SHAPE, **given).run(z).images - exact).square().mean().sqrt().item()


def trained(**options):
    return distill(
        mixture, **{"shape": SHAPE, "nfe": 5, "total_kimg": 0.032, "batch": 16, "progress": False, **options}
    )


def test_distill_says_when_it_lost_to_what_runs_without_it(caplog):
    predictor = trained()
    report = predictor.report
    assert report.lost
    assert report.free == best_training_free(5)
    assert report.rmse == pytest.approx(rmse_of(predictor=predictor), rel=0.3)
    assert report.free_rmse == pytest.approx(rmse_of(plan=report.free), rel=0.3)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.message == f"NFE 5: {report}"
    assert "it lost to a training-free solver: on 16 latents that it was not learned from" in record.message
    assert f"{report.rmse:.4f}, {report.rmse / report.free_rmse:.2f} times the {report.free_rmse:.4f} of deis" in str(
        report
    )
    assert "train longer (total_kimg=)" in str(report)
    assert 'predictor="none"' in str(report)


def test_distill_says_how_much_nearer_it_is(caplog):
    caplog.set_level("INFO", logger="amed_engine")
    predictor = trained(preset="amed-plugin", total_kimg=2, batch=64)
    report = predictor.report
    assert not report.lost
    assert report.latents == 64
    assert report.rmse == pytest.approx(rmse_of(predictor=predictor), rel=0.3)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"NFE 5: on 64 latents that it was not learned from RMSE {report.rmse:.4f}" in caplog.text


def test_the_cost_is_what_it_says():
    calls = []

    def counted(x, sigma):
        calls.append(len(x))
        return mixture(x, sigma)

    report = distill(counted, shape=SHAPE, nfe=3, total_kimg=0.032, batch=16, progress=False).report
    assert report.evaluations == 16 * (32 + 3 + 3)
    # One to see features, then two rounds of the teacher's 8 evaluations and the student's 3.
    assert sum(calls) == 1 + 16 * 2 * (8 + 3) + report.evaluations


def test_what_is_learned_does_not_depend_on_it(monkeypatch):
    one = trained().state_dict()
    monkeypatch.setattr("amed_engine.training.distill.LATENTS", 4)
    other = trained()
    assert other.report.latents == 4
    assert all(torch.equal(one[name], value) for name, value in other.state_dict().items())


def test_conditions_that_end_with_the_training_are_enough():
    given = (torch.zeros(16, 3) for _ in range(2))

    def conditional(x, sigma, labels):
        return mixture(x, sigma)

    predictor = distill(
        conditional, shape=SHAPE, label_dim=3, nfe=3, total_kimg=0.032, batch=16, conditions=given, progress=False
    )
    assert predictor.report.latents == 16
    bound = [mixture, lambda x, sigma: mixture(x, sigma)]
    assert trained(conditions=iter(bound)).report.latents == 16
    options = {"samples": 16, "batch": 8, "starts": 1, "early": 0, "late": 1, "teacher_nfe": 8, "progress": False}
    assert fit(mixture, shape=SHAPE, nfe=3, conditions=iter(bound), **options).report.held_out.latents == 8


def test_a_fit_is_judged_on_latents_of_its_own(caplog):
    caplog.set_level("INFO", logger="amed_engine")
    fitted = fit(mixture, shape=SHAPE, nfe=[3, 5], samples=64, starts=1, progress=False)
    for nfe, predictor in fitted.items():
        told = predictor.report.held_out
        assert (told.lost, told.latents) == (False, 8)
        assert told.rmse == pytest.approx(rmse_of(predictor=predictor), rel=0.5)
        assert f"NFE {nfe}: {predictor.report}" in caplog.text
        assert f"on 8 latents that it was not learned from RMSE {told.rmse:.4f}" in str(predictor.report)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_fit_to_too_few_latents_says_that_it_lost(caplog):
    """Nearer than any other on the 8 latents that it was fitted to, and not beyond them."""
    options = {"samples": 8, "starts": 1, "early": 0, "late": 1, "teacher_nfe": 6, "progress": False}
    predictor = fit(mixture, shape=SHAPE, nfe=5, **options)
    report = predictor.report
    assert report.rmse < report.free_rmse
    assert report.held_out.lost
    assert rmse_of(predictor=predictor) > rmse_of(plan=best_training_free(5)) * 0.8
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "it lost to a training-free solver: on 8 latents that it was not learned from" in record.message
    assert "fit to more latents (samples=)" in record.message


def test_numbers_that_are_none_lose():
    report = trained().report
    assert report._replace(rmse=float("nan")).lost
    assert not report._replace(rmse=0.0).lost
