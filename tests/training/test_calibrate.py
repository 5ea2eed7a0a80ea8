"""Calibration: known solutions, the loop in lockstep against the loop, and what it may cost."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from amed_engine import ConfigError, Plan, Sampler, calibrate, make_plan, wrap
from amed_engine.adapters.discrete import alphas_cumprod
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.engine import measure
from amed_engine.engine.resolve import resolve
from amed_engine.evaluation.comparison import TRAINING_FREE
from amed_engine.solvers.schedule import SCHEDULES
from amed_engine.training.batches import BoundDenoiser
from amed_engine.training.calibrate import EVALUATIONS, LATENTS
from amed_engine.training.contenders import RHOS, SHIFTS, contenders
from amed_engine.training.fit import fit
from amed_engine.training.gauss_newton import Example
from amed_engine.training.halving import halve
from amed_engine.training.lockstep import together

SHAPE = (1, 3, 3)
MEANS = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(3))


class Gaussian(nn.Module):
    """Exact denoiser of N(m_k, 0.5²) for each of three classes k, m_0 for none; counts the rows and calls it is asked with."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, classes: int = 0):
        super().__init__()
        self.means = nn.Parameter(MEANS[: 1 + classes].clone(), requires_grad=False)
        self.sample_shape, self.label_dim, self.rows, self.calls = SHAPE, classes, 0, 0

    def forward(self, x, sigma, labels=None):
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        mean = self.means[:1]
        if labels is not None:
            mean = mean + torch.einsum("bk,kchw->bchw", labels.to(x), self.means[1:] - mean)
        return mean + (x - mean) * 0.25 / (0.25 + sigma.view(-1, 1, 1, 1) ** 2)


def mixture(x, sigma):
    """Exact for pixels that are -0.8 or 0.8, give or take 0.1: no straight trajectories."""
    variance = (0.01 + sigma**2).reshape(-1, 1, 1, 1)
    share = 0.01 / variance
    return share * x + (1 - share) * 0.8 * torch.tanh(0.8 * x / variance)


def solution(mean, latents):
    """Of the ODE from sigma 80 to 0.002 for N(mean, 0.5²): x - mean ∝ sqrt(0.25 + sigma²)."""
    scale = ((0.25 + 0.002**2) / (0.25 + 80.0**2)) ** 0.5
    return mean + (80 * latents - mean) * scale


def noise_of(seeds, shape=SHAPE):
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.fixture(autouse=True)
def nothing_is_known():
    measure._known.clear()


def calibrated(model, nfe=3, **options):
    return calibrate(model, nfe, progress=False, **options)


# ---- what is found


@pytest.mark.parametrize("nfe", [2, 5])
def test_the_best_plan_comes_nearest_to_the_known_solution(nfe):
    """Every plan run by a Sampler on the same seeds: none ends nearer, and the table says what each of the last ones does."""
    model = Gaussian()
    found = calibrated(model, nfe)
    exact = solution(MEANS[0], noise_of(range(LATENTS)))
    errors = {}
    for row in found.rows:
        images = Sampler(model, plan=row.plan).run(range(LATENTS)).images
        errors[row.plan] = (images - exact).square().flatten(1).mean(1)
    least = min(error.mean().sqrt().item() for error in errors.values())
    best = errors[replace(found.plan, model=None, dtype=None, wrapping=None)].mean().sqrt().item()
    assert best <= 1.02 * least + 2 * found.reference_error
    finalists = [row for row in found.rows if row.latents == LATENTS]
    assert len(finalists) > 1
    for row in finalists:
        slack = 2 * found.reference_error + 1e-4
        assert row.rmse == pytest.approx(errors[row.plan].mean().sqrt().item(), abs=slack)
        assert row.median == pytest.approx(errors[row.plan].sqrt().quantile(0.5).item(), abs=slack)


def test_rows_are_ordered_and_every_plan_is_there_once():
    model = Gaussian()
    found = calibrated(model)
    keys = [(-row.latents, row.rmse) for row in found.rows]
    assert keys == sorted(keys)
    mean = measure.measure_mean(model)
    entered = contenders(resolve(model), 3, (False, True, "mean"), mean)
    assert {row.plan for row in found.rows} == {each.plan for each in entered}
    assert {row.name for row in found.rows} == set(TRAINING_FREE)
    assert {row.plan.afs for row in found.rows} == {False, True, "mean"}


def test_a_mean_far_from_zero_is_started_about():
    """Beside it both other first steps are far off where data lie far from zero."""

    class Far(Gaussian):
        def __init__(self):
            super().__init__()
            self.means += 10

    assert calibrated(Far()).plan.afs == "mean"


def test_the_fine_solution_says_how_far_off_it_is():
    model = Gaussian()
    found = calibrated(model)
    plans = [make_plan(n, solver="deis", options={"max_order": 4}, schedule="polynomial", afs=False) for n in (32, 16)]
    fine, coarse = (Sampler(model, plan=plan).run(range(16)).images for plan in plans)
    assert found.reference_error == pytest.approx((fine - coarse).square().mean().sqrt().item(), rel=1e-3)
    exact = solution(MEANS[0], noise_of(range(16)))
    assert (fine - exact).square().mean().sqrt().item() < found.reference_error


def test_the_recipe_is_a_file_and_a_sampler_takes_it(tmp_path):
    model = Gaussian(3)
    found = calibrated(model)
    assert (found.plan.model, found.plan.dtype) == (fingerprint(model), "float32")
    found.plan.save(tmp_path / "recipe.json")
    sampler = Sampler(model, plan=tmp_path / "recipe.json")
    assert sampler.plan == found.plan
    exact = solution(MEANS[[2]], noise_of([7]))
    assert (sampler.run([7], class_labels=1).images - exact).abs().max() < 10 * found.rows[0].rmse
    with pytest.raises(ConfigError, match="this plan was made for another model"):
        Sampler(Gaussian(2), plan=tmp_path / "recipe.json")


def test_the_table_and_the_json_say_the_same():
    found = calibrated(Gaussian())
    said = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert Plan.from_json(said["plan"]) == found.plan
    lines = found.table().splitlines()
    assert len(lines) == len(said["rows"]) + 2
    for line, row in zip(lines[1:], said["rows"], strict=False):
        assert line.split("  ")[0].strip() == row["name"]
        numbers = (str(row["latents"]), f"{row['rmse']:.4f}", f"{row['median']:.4f}")
        assert line.removeprefix(row["name"]).split()[:3] == list(numbers)
        assert line.endswith(row["plan"])
    assert lines[-1].startswith(f"{len(found.rows)} plans, against {found.reference}")
    assert f"{found.evaluations} evaluations spent" in lines[-1]


def test_the_table_may_be_cut_to_its_best():
    found = calibrated(Gaussian())
    _, *best, last = found.table(rows=3).splitlines()
    assert [line.split()[-6:] for line in best] == [line.split()[-6:] for line in found.table().splitlines()[1:4]]
    assert last.startswith(f"3 of {len(found.rows)} plans, against {found.reference}")
    assert found.table(rows=len(found.rows) + 1) == found.table()
    for rows in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="rows"):
            found.table(rows=rows)


# ---- what it costs


@pytest.mark.parametrize("nfe", [1, 3, 10, 16])
@pytest.mark.parametrize("classes", [0, 3])
def test_the_budget_is_kept_and_said(nfe, classes):
    model = Gaussian(classes)
    found = calibrated(model, nfe)
    assert model.rows <= found.evaluations <= EVALUATIONS  # of the mean 512 are counted, whatever it took
    assert found.evaluations - model.rows <= 512
    assert found.rows[0].latents == LATENTS


def test_guidance_doubles_the_rows_of_a_call_and_not_the_evaluations():
    model = Gaussian(3)
    found = calibrated(model, guidance_scale=2.0)
    assert found.plan.guidance_scale == 2.0
    assert found.evaluations <= EVALUATIONS
    assert model.rows <= 2 * found.evaluations
    images = Sampler(model, plan=found.plan).run([3], 0, 2.0).images
    # Two affine answers combined are that of N(m_0 + 2 (m_1 - m_0), 0.5²).
    exact = solution(2 * MEANS[[1]] - MEANS[[0]], noise_of([3]))
    assert (images - exact).abs().max() < 10 * found.rows[0].rmse


def test_several_numbers_share_the_fine_solution():
    model = Gaussian()
    many = calibrated(model, [2, 3])
    together_cost, model.rows = model.rows, 0
    measure._known.clear()
    alone = calibrated(model, 3)
    assert many[3] == alone
    cost_of_3, model.rows = model.rows, 0
    measure._known.clear()
    calibrated(model, 2)
    shared = LATENTS * 32 + 16 * 16 + measure.LATENTS
    assert together_cost == cost_of_3 + model.rows - shared


def test_latents_and_labels_are_those_of_the_sampler(monkeypatch):
    model, seen = Gaussian(3), []
    forward = Gaussian.forward

    def looked(self, x, sigma, labels=None):
        seen.append((x, sigma, labels))
        return forward(self, x, sigma, labels)

    monkeypatch.setattr(Gaussian, "forward", looked)
    drawn = Sampler(model, nfe=3, solver="euler", afs=False, verify=False).run(range(LATENTS))
    theirs = seen[0]
    seen.clear()
    calibrated(model)
    ours = next(call for call in seen if len(call[0]) == LATENTS)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(ours[2].argmax(1), drawn.labels)


def test_the_global_generators_are_left_alone():
    before = torch.get_rng_state()
    calibrated(Gaussian())
    assert torch.equal(torch.get_rng_state(), before)


# ---- conditions and families


def test_conditions_may_be_classes_tensors_or_denoisers():
    model = Gaussian(3)
    classes = [torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)]
    rows = [torch.nn.functional.one_hot(c, 3).float() for c in classes]
    bound = [lambda x, sigma, r=r: model(x, sigma, r) for r in rows]
    by_class, by_row, by_denoiser = (calibrated(model, 2, conditions=c, batch=4) for c in (classes, rows, bound))
    assert by_class == by_row
    assert {row.plan.afs for row in by_class.rows} == {False, True, "mean"}
    assert {row.plan.afs for row in by_denoiser.rows} == {False, True}  # it does not say whose mean to start about
    assert by_denoiser.evaluations <= EVALUATIONS
    ours, theirs = ({r.plan: r.rmse for r in c.rows if r.latents == LATENTS} for c in (by_class, by_denoiser))
    both = ours.keys() & theirs.keys()
    assert both
    assert [ours[plan] for plan in both] == pytest.approx([theirs[plan] for plan in both], rel=1e-4)


def test_conditions_of_no_class_leave_the_mean_out():
    def denoise(x, sigma, prompt=None):
        return mixture(x, sigma)

    model = wrap_conditions(denoise)
    found = calibrated(model, 2, conditions=[torch.zeros(64, 5)], shape=SHAPE, label_dim=3)
    assert {row.plan.afs for row in found.rows} == {False, True}


def wrap_conditions(denoise):
    return lambda x, sigma, labels=None: denoise(x, sigma, labels)


def test_a_discrete_network_is_tried_on_its_own_steps():
    class Network(nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    network = wrap(Network(), prediction="epsilon", betas="linear", shape=SHAPE)
    found = calibrated(network, 2)
    named = {(row.plan.schedule, row.plan.rho) for row in found.rows}
    assert named == {(name, rho) for name, exponents in RHOS.items() for rho in exponents}
    own = make_plan(
        2,
        solver="euler",
        schedule="discrete",
        rho=1.0,
        afs=False,
        sigma_min=network.sigma_min,
        sigma_max=network.sigma_max,
        alphas_cumprod=alphas_cumprod("linear"),
    )
    (row,) = [
        r for r in found.rows if (r.name, r.plan.schedule, r.plan.rho, r.plan.afs) == ("euler", "discrete", 1.0, False)
    ]
    assert row.plan.sigmas == pytest.approx(own.sigmas)


def test_a_flow_is_tried_on_times_too():
    class Network(nn.Module):
        """The velocity n - x0 where every datum is 0.3: x_t = 0.3 (1 - t) + t n."""

        def forward(self, x, t):
            return (x - 0.3) / (t.view(-1, 1, 1, 1) / 1000)

    network = wrap(Network(), prediction="flow", shape=SHAPE)
    found = calibrated(network, 3)
    custom = [row for row in found.rows if row.plan.schedule == "custom"]
    assert len(custom) == len(SHIFTS) * sum(row.plan.schedule == "logsnr" for row in found.rows)
    ends = {(row.plan.sigmas[0], row.plan.sigmas[-1]) for row in found.rows}
    assert all(end == pytest.approx((80.0, 0.002)) for end in ends)
    times = {tuple(round(s / (1 + s), 6) for s in row.plan.sigmas) for row in custom if row.plan.intervals == 3}
    assert len(times) == len(SHIFTS)
    even = next(t for t in times if abs(t[0] - 2 * t[1] + t[2]) < 1e-5)
    assert even[1] - even[2] == pytest.approx(even[2] - even[3], abs=1e-5)
    images = Sampler(network, plan=found.plan).run(4).images
    torch.testing.assert_close(images, torch.full_like(images, 0.3), rtol=0, atol=0.01)


def test_every_schedule_has_exponents():
    assert set(RHOS) == set(SCHEDULES)


# ---- in lockstep


def example_of(model, count=3):
    x = 80 * noise_of(range(count))
    return Example(BoundDenoiser(model, None, None), x, x, measure.mean_of(model, 80.0).rows())


@pytest.mark.parametrize("nfe", [1, 4, 5])
def test_every_plan_ends_where_a_sampler_ends(nfe):
    counted = []
    model = resolve(lambda x, sigma: (counted.append(len(x)), mixture(x, sigma))[1], shape=SHAPE)
    example = example_of(model)
    plans = [c.plan for c in contenders(model, nfe, (False, True, "mean"), measure.mean_of(model, 80.0))]
    counted.clear()
    ends, spent = together([replace(plan.program(), mean=None) for plan in plans], example, rows=16)
    assert spent == sum(counted)
    assert max(counted) <= 16
    assert spent < len(example.x) * sum(plan.nfe for plan in plans)
    for plan, end in zip(plans, ends, strict=True):
        images = Sampler(mixture, plan=plan, shape=SHAPE, verify=False).run(example.x / 80).images
        torch.testing.assert_close(end, images, rtol=1e-3, atol=1e-4)


def test_what_all_would_ask_is_asked_once():
    """Two evaluations of Euler, iPNDM and DEIS from one sigma on the same levels: the second differs from none either."""
    model = resolve(mixture, shape=SHAPE)
    plans = [make_plan(3, solver=s, schedule="logsnr", afs=False) for s in ("euler", "ipndm", "deis")]
    _, spent = together([plan.program() for plan in plans], example_of(model), rows=64)
    assert spent == 3 * (1 + 1 + 3)
    _, apart = together([plan.program() for plan in plans[:1]], example_of(model), rows=64)
    assert apart == 3 * 3


@pytest.mark.parametrize("budget", [400, 700, 1500, 5000, 40_000])
def test_halving_never_spends_more_than_its_budget(budget):
    counted = []
    model = resolve(lambda x, sigma: (counted.append(len(x)), mixture(x, sigma))[1], shape=SHAPE)
    example = example_of(model, 32)
    entered = contenders(model, 3, (False, True))
    counted.clear()
    _, spent = halve(entered, [example], budget, 64)
    assert spent == sum(counted) <= budget


def test_halving_with_plenty_to_spend_finds_the_best_of_all():
    model = resolve(mixture, shape=SHAPE)
    example = example_of(model, 32)
    target = Sampler(mixture, solver="heun", nfe=128, schedule="polynomial", afs=False, shape=SHAPE).run(example.x / 80)
    example = example._replace(target=target.images)
    entered = contenders(model, 5, (False, True))
    (best, *_), _ = halve(entered, [example], 100_000, 256)
    ends, _ = together([each.plan.program() for each in entered], example, 256)
    errors = [(end - example.target).square().mean().sqrt().item() for end in ends]
    assert best.rmse == pytest.approx(min(errors), rel=1e-4)


def rare(x, sigma):
    """Pixels of N(0, 1), but where the first one is large the mixture four times as wide. It keeps its rank all the way."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    easy, hard = x / (1 + sigma**2), 4 * mixture(x / 4, sigma / 4)
    first = torch.zeros_like(x, dtype=torch.bool)
    first[..., :1, :1] = True
    large = (x / (1 + sigma**2).sqrt())[..., :1, :1] > 1.45
    return torch.where(large & ~first, hard, easy)


def test_the_few_latents_that_are_hard_for_all_plans_have_their_say_from_the_first_round_on():
    """One solver is nearly exact on 62 of 64 and far off on the others, which stand behind half of the rest."""
    model = resolve(rare, shape=SHAPE)
    noise = noise_of(range(64)).flip(0)
    assert (noise[:, 0, 0, 0] > 1.45).nonzero().flatten().tolist() == [25, 63]
    exact = Sampler(rare, solver="heun", nfe=128, schedule="polynomial", afs=False, shape=SHAPE).run(noise).images
    example = Example(BoundDenoiser(model, None, None), 80 * noise, exact)
    entered = contenders(model, 5, (False, True))
    found, _ = halve(entered, [example], 7000, 64)
    errors = {}
    for entrant in found:
        (end,), _ = together([entrant.program], example, 64)
        errors[entrant.contender] = (end - exact).square().mean().sqrt().item()
    assert found[0].rmse == pytest.approx(min(errors.values()), rel=1e-3)
    # Estimates of those that went out on some of the latents, too: the evenly drawn ones alone are wrong by a factor of ten.
    first_out = [entrant for entrant in found if int(entrant.measured.sum()) == 16]
    assert len(first_out) > 10
    assert all(0.5 < entrant.rmse / errors[entrant.contender] < 2 for entrant in first_out)


# ---- fit starts there


def test_a_fit_says_how_it_compares_with_the_best_plan(caplog):
    caplog.set_level("INFO", logger="amed_engine")
    predictor = fit(mixture, nfe=3, shape=SHAPE, samples=32, starts=1, early=1, late=1, progress=False)
    report = predictor.report
    assert report.latents == 32
    assert report.rmse < report.free_rmse
    assert str(report) in caplog.text
    assert f"RMSE {report.rmse:.4f}, median {report.median:.4f}" in str(report)
    assert f"{report.rmse / report.free_rmse:.2f} of the {report.free_rmse:.4f}, {report.free_median:.4f}" in str(
        report
    )
    teacher = make_plan(24, solver="deis", options={"max_order": 4}, schedule="polynomial", afs=False)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(32, *SHAPE, generator=generator)
    exact = Sampler(mixture, plan=teacher, shape=SHAPE).run(z).images
    for plan, rmse, median in (
        (report.free, report.free_rmse, report.free_median),
        (None, report.rmse, report.median),
    ):
        given = {"predictor": predictor} if plan is None else {"plan": plan}
        images = Sampler(mixture, shape=SHAPE, **given).run(z).images
        squares = (images - exact).square().flatten(1).mean(1)
        assert squares.mean().sqrt().item() == pytest.approx(rmse, rel=1e-3)
        assert squares.median().sqrt().item() == pytest.approx(median, rel=1e-3)


@pytest.mark.parametrize("afs", [False, True, "mean"])
def test_a_fit_keeps_to_the_first_step_that_was_asked_for(afs):
    options = {"samples": 8, "starts": 1, "early": 0, "late": 1, "teacher_nfe": 6, "progress": False}
    predictor = fit(mixture, nfe=3, afs=afs, shape=SHAPE, **options)
    assert predictor.plan.afs == predictor.report.free.afs == afs
    assert type(predictor.plan.afs) is type(afs)


@pytest.mark.parametrize("given", ["numbers", "rows"])
def test_a_fit_with_classes_of_the_callers_own_may_start_about_their_mean(given):
    labels = torch.arange(8) % 3
    conditions = [labels if given == "numbers" else nn.functional.one_hot(labels, 3).float()]
    options = {"samples": 8, "batch": 8, "starts": 1, "early": 0, "late": 1, "teacher_nfe": 12, "progress": False}
    found = fit(Gaussian(3), nfe=2, conditions=conditions, **options)
    assert found.plan.afs == found.report.free.afs == "mean"
    assert (
        found.report.free_rmse
        < 0.1 * fit(Gaussian(3), nfe=2, conditions=conditions, afs=True, **options).report.free_rmse
    )


def test_a_fit_with_denoisers_that_tell_no_class_starts_about_none():
    model = Gaussian(3)
    bound = [lambda x, sigma: model(x, sigma, torch.eye(3)[[0] * len(x)])]
    options = {"samples": 8, "batch": 8, "starts": 1, "early": 0, "late": 1, "teacher_nfe": 12, "progress": False}
    found = fit(model, nfe=2, conditions=bound, **options)
    assert found.plan.afs != "mean"
    assert model.rows % 8 == 0  # nothing was measured


# ---- bad input


def unasked(x, sigma):
    raise AssertionError("a calibration that cannot be has evaluated the network")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"nfe": 0}, "nfe must be an integer from 1 to 16, got 0"),
        ({"nfe": True}, "nfe must be an integer from 1 to 16, got True"),
        ({"nfe": 17}, "nfe must be an integer from 1 to 16, got 17"),
        ({"nfe": [3, "4"]}, "nfe must be an integer from 1 to 16, got '4'"),
        ({"nfe": []}, "nfe is empty"),
        ({"shape": None}, r"pass shape=\(C, H, W\)"),
        ({"guidance_scale": 2.0}, "guidance_scale needs a class-conditional model"),
        ({"batch": 0}, "batch must be an integer from 1 to 64, got 0"),
        ({"batch": 48}, "batch must divide the 64 latents, got 48"),
        ({"conditions": []}, "conditions gave no batch"),
        ({"conditions": [torch.zeros(64, dtype=torch.int64)]}, "the model has label_dim 0"),
        ({"conditions": [torch.zeros(8, 3)]}, "conditions gave 8 rows for a batch of 64"),
        ({"sigma_min": 90.0}, "need sigma_min < sigma_max"),
    ],
)
def test_what_cannot_be_is_refused_before_the_network_runs(asked, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(unasked, **{"shape": SHAPE, "progress": False, **asked})


def test_denoisers_of_too_many_rows_are_refused_before_the_network_runs():
    with pytest.raises(ConfigError, match="pass denoisers of at most 16 samples, and batch=16"):
        calibrated(unasked, 5, shape=SHAPE, conditions=[unasked], batch=64)
    assert calibrated(mixture, 5, shape=SHAPE, conditions=[mixture], batch=16).evaluations <= EVALUATIONS


def test_a_model_that_ends_nowhere_is_named():
    with pytest.raises(ConfigError, match="not finite; look at what"):
        calibrated(lambda x, sigma: x * float("nan"), shape=SHAPE)
