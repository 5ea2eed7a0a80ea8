"""Searching for noise levels: the cheapest path against all paths, errors of steps against ones written out."""

import itertools
import json
import math
from functools import partial

import pytest
import torch

from amed_engine import (
    ConfigError,
    FileFormatError,
    Sampler,
    make_schedule,
    make_solver,
    measure_mean,
    sample,
    search_schedule,
)
from amed_engine.checkpoints import save_model
from amed_engine.checkpoints.levels import read_levels, write_levels
from amed_engine.sampling.denoiser import analytic_first_step
from amed_engine.solvers.plan import make_plan
from amed_engine.training.search import TeacherPath, cheapest_path, cost_matrix, euler_step, step_of

SHAPE = (1, 4, 4)
CENTRES = torch.tensor([-0.8, 0.8])


def mixture(x, sigma):
    """Exact for pixels that are -0.8 or 0.8, give or take 0.1: no straight trajectories."""
    variance = (0.01 + sigma**2).reshape(-1, 1, 1, 1)
    share = 0.01 / variance
    return share * x + (1 - share) * 0.8 * torch.tanh(0.8 * x / variance)


def search(model=mixture, **options):
    return search_schedule(model, **({"samples": 8, "shape": SHAPE, "grid": 12, "progress": False} | options))


# ---- the cheapest path


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("coefficient", [0.8, 1.0, 1.15])
def test_no_other_path_is_cheaper(steps, coefficient):
    """Against every choice of inner levels, on costs of no pattern."""
    count = 8
    cost = torch.rand(count, count, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    cost[torch.tril_indices(count, count).unbind()] = math.inf

    def price(path):
        return sum(coefficient**s * cost[i, j].item() for s, (i, j) in enumerate(itertools.pairwise(path)))

    every = [(0, *inner, count - 1) for inner in itertools.combinations(range(1, count - 1), steps - 1)]
    assert tuple(cheapest_path(cost, steps, coefficient)) == min(every, key=price)


# ---- what a step costs


@pytest.fixture
def levels():
    return make_schedule("polynomial", 9, 0.002, 80.0)


ABOUT = torch.full((1, *SHAPE), 0.3, dtype=torch.float64)


def path_of(levels, afs=False, denoiser=mixture):
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * levels[0]
    first = partial(analytic_first_step, mean=ABOUT if afs == "mean" else None)
    return TeacherPath.of(denoiser, x, levels, first if afs else None)


def test_the_states_and_answers_are_the_teachers(levels):
    path = path_of(levels)
    teacher = sample(mixture, path.states[0], levels, make_solver("deis", max_order=4), trajectory=True)
    assert torch.equal(path.states, teacher)
    for i in range(len(levels) - 1):
        torch.testing.assert_close(path.answers[i], mixture(teacher[i], levels[i].expand(3)))


@pytest.mark.parametrize("afs", [False, True, "mean"])
@pytest.mark.parametrize(("name", "options"), [("euler", {}), ("heun", {}), ("dpm", {"r": 0.4})])
def test_costs_are_the_errors_of_single_steps(levels, name, options, afs):
    """Of the loop itself, for every pair; Euler's formula and its step agree."""
    path, solver = path_of(levels, afs), make_solver(name, **options)
    found = [cost_matrix(path, step) for step in ((step_of(solver), euler_step)[: 2 if name == "euler" else 1])]
    for i, j in itertools.product(range(len(levels)), repeat=2):
        expected = math.inf
        if i < j:
            first = {"afs": afs, "mean": ABOUT if afs == "mean" else None} if i == 0 else {}
            end = sample(mixture, path.states[i], levels[[i, j]], solver, **first)
            expected = (end - path.states[j]).square().mean().item()
        assert all(cost[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-12) for cost in found)


def test_euler_costs_no_evaluation_but_the_teachers():
    calls = []
    search(lambda x, sigma: (calls.append(len(x)), mixture(x, sigma))[1], samples=8, batch=4, grid=10)
    assert calls == [4] * 9 * 2


# ---- what is found


@pytest.mark.parametrize("cost", ["euler", "solver"])
def test_of_all_levels_of_a_small_grid_euler_could_hardly_do_better(cost):
    """Run on every choice of inner levels: the found one is among the best twentieth, far from the median."""
    grid = make_schedule("polynomial", 11, 0.002, 80.0)
    z = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(9))
    fine = make_schedule("polynomial", 200, 0.002, 80.0)
    exact = sample(mixture, z * 80.0, fine, make_solver("heun"))

    def error(levels):
        return (sample(mixture, z * 80.0, levels, make_solver("euler"), afs=True) - exact).square().mean().item()

    found = search(solver="euler", nfe=3, afs=True, grid=grid, samples=64, cost=cost)
    every = [grid[[0, *inner, 10]] for inner in itertools.combinations(range(1, 10), 3)]
    errors = sorted(map(error, every))
    assert error(found) <= errors[len(errors) // 20]


def test_on_digits_euler_errs_less_than_on_the_named_schedules():
    levels = search_schedule("digits", solver="euler", nfe=5, grid=31, samples=32, progress=False)
    seeds = range(500, 516)
    exact = Sampler("digits", solver="deis", nfe=30, schedule="polynomial", afs=False).run(seeds).images

    def rmse(schedule):
        images = Sampler("digits", solver="euler", nfe=5, schedule=schedule).run(seeds).images
        return (images - exact).square().mean().sqrt().item()

    assert rmse(levels) < 0.95 * min(rmse("time_uniform"), rmse("polynomial"), rmse("logsnr"))


SETTINGS = [
    ("euler", {}, 5, None),
    ("euler", {}, 5, False),
    ("heun", {}, 5, None),
    ("heun", {}, 6, None),
    ("dpm", {}, 5, True),
    ("ipndm", {"max_order": 2}, 4, True),
    ("deis", {}, 3, None),
    ("dpmpp", {"max_order": 2}, 5, None),
    ("unipc", {}, 5, None),
]


@pytest.mark.parametrize(("solver", "options", "nfe", "afs"), SETTINGS)
def test_a_sampler_spends_what_was_asked(solver, options, nfe, afs):
    """As many levels as the named schedules have at this NFE; the network is called that often."""
    levels = search(solver=solver, solver_options=options, nfe=nfe, afs=afs)
    assert (levels.dtype, levels.device.type) == (torch.float64, "cpu")
    named = make_plan(nfe, solver=solver, options=options, afs=afs, schedule="polynomial")
    assert (levels[0].item(), levels[-1].item()) == pytest.approx((80.0, 0.002))
    calls = []
    sampler = Sampler(
        lambda x, sigma: (calls.append(1), mixture(x, sigma))[1],
        solver=solver,
        solver_options=options,
        nfe=nfe,
        afs=afs,
        schedule=levels,
        shape=SHAPE,
    )
    assert sampler.run(2).images.isfinite().all()
    assert len(calls) == nfe
    assert (sampler.plan.afs, sampler.plan.intervals) == (named.afs, named.intervals)


def test_an_analytic_first_step_has_its_own_costs():
    """The first step's error with AFS is not that without: other levels are best."""

    def off_centre(x, sigma):
        return 3 + mixture(x - 3, sigma)  # AFS takes the data's mean for zero

    free, paid = (search(off_centre, nfe=nfe, afs=afs, grid=40) for nfe, afs in ((3, True), (4, False)))
    assert len(free) == len(paid)
    assert not torch.equal(free, paid)


def test_the_ends_are_the_models(tiny_conditional):
    levels = search(tiny_conditional, shape=None, sigma_min=0.05, sigma_max=20.0)
    assert (levels[0].item(), levels[-1].item()) == pytest.approx((20.0, 0.05))


def test_a_seed_decides_everything(tiny_conditional):
    def run(seed):
        return search(tiny_conditional, shape=None, seed=seed, grid=60, samples=4)

    before = torch.get_rng_state()
    first = run(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(run(1), first)
    assert any(not torch.equal(run(seed), first) for seed in (2, 3, 4))


def test_conditions_and_guidance_reach_the_network(tiny_conditional):
    seen = []
    network = tiny_conditional.forward

    def spy(x, sigma, labels):
        seen.append(labels)
        return network(x, sigma, labels)

    tiny_conditional.forward = spy
    conditions = [torch.full((4,), 3), torch.full((4,), 7)]
    search(tiny_conditional, shape=None, batch=4, conditions=conditions, guidance_scale=2.0)
    assert {len(labels) for labels in seen} == {8}  # guidance doubles the batch
    assert [sorted(labels.argmax(1).unique().tolist()) for labels in (seen[0][4:], seen[-1][4:])] == [[3], [7]]
    assert all(not labels[:4].any() for labels in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 0}, "nfe must be a positive integer, got 0"),
        ({"nfe": 4, "solver": "heun", "afs": True}, "nfe=4 is not a whole number of intervals"),
        ({"solver": "amed"}, "solver 'amed' needs a predictor, whose noise levels are its own"),
        ({"solver": "rk4"}, "unknown solver 'rk4'"),
        ({"solver_options": {"points": 2}}, "solver 'ipndm' has no option points"),
        ({"cost": "l2"}, "cost must be one of euler, solver; got 'l2'"),
        ({"cost": "solver"}, "'ipndm.*' remembers earlier evaluations.*use cost='euler'"),
        ({"cost": "solver", "solver": "unipc", "solver_options": {"max_order": 1}}, "remembers earlier evaluations"),
        ({"coefficient": 0.0}, "coefficient must be a positive number, got 0.0"),
        ({"coefficient": math.nan}, "coefficient must be a positive number, got nan"),
        ({"grid": 5}, "grid must be an integer from 6 to 1000, got 5"),
        ({"grid": 6, "afs": True}, "grid must be an integer from 7 to 1000, got 6"),
        ({"grid": torch.tensor([80.0, 1.0, 0.1])}, "NFE 5 needs 6 noise levels, got a grid of 3"),
        ({"grid": torch.tensor([1.0, 80.0])}, "sigmas must decrease"),
        ({"grid": "polynomial"}, "grid must be an integer"),
        ({"samples": 0}, "samples and batch must be positive integers, got 0 and 64"),
        ({"batch": 0}, "samples and batch must be positive integers, got 8 and 0"),
        ({"shape": None}, "does not say what shape its samples have"),
        ({"guidance_scale": 2.0}, "guidance_scale needs a class-conditional model"),
        ({"sigma_min": 90.0}, "need sigma_min < sigma_max"),
        pytest.param(
            {"model": lambda x, sigma: x * math.nan}, "the teacher's trajectory is not finite", id="not finite"
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        search(options.pop("model", mixture), **options)


# ---- its file, and the command line


@pytest.fixture
def found(amed, tmp_path, tiny_conditional):
    """The paths of a network and of levels found for it at 3 evaluations of Euler."""
    save_model(tiny_conditional, tmp_path / "m.safetensors")
    asked = ("--model", tmp_path / "m.safetensors", "--nfe", 3, "--solver", "euler", "--afs", "--device", "cpu")
    code, out, err = amed("search-schedule", *asked, "--grid", 9, "--samples", 4, "--out", tmp_path / "levels.json")
    assert (code, err) == (0, "")
    assert "euler, custom, 4 intervals, AFS, NFE 3" in out
    return tmp_path / "m.safetensors", tmp_path / "levels.json"


def test_the_command_writes_what_the_function_finds(found, tiny_conditional):
    levels = search(tiny_conditional, shape=None, nfe=3, solver="euler", afs=True, grid=9, samples=4)
    plan = read_levels(found[1])
    assert torch.equal(plan.levels, levels)
    assert (plan.solver, plan.nfe, plan.afs) == ("euler", 3, True)


def test_sample_evaluate_and_compare_take_the_file(found, amed, tmp_path):
    """With its solver and its analytic first step unless others are asked for."""
    model, levels = found
    common = ("--model", model, "--schedule", levels, "--device", "cpu")
    code, out, _ = amed("sample", *common, "--seeds", "0-1", "--out", tmp_path / "o.png")
    assert (code, out.splitlines()[0]) == (0, "euler, custom, 4 intervals, AFS, NFE 3")
    code, out, _ = amed("sample", *common, "--solver", "heun", "--seeds", "0", "--out", tmp_path / "o.png")
    assert (code, out.splitlines()[0]) == (0, "heun, custom, 4 intervals, AFS, NFE 7")
    code, out, _ = amed("evaluate", *common, "--nfe", 4, "--seeds", "0-3", "--json", "-")
    assert (code, json.loads(out)["plan"]) == (0, "euler, custom, 4 intervals, NFE 4")
    asked = ("--nfe", 3, "--seeds", "0-1", "--samples", 2, "--json", "-")
    code, out, _ = amed("compare", *common, *asked)
    compared = json.loads(out)
    assert code == 0
    assert len(compared["rows"]) == 11  # all but heun and dpm, which these levels cost more
    assert all("custom, 4 intervals, AFS, NFE 3" in row["plan"] for row in compared["rows"])
    assert compared["curves"] == {}
    code, _, err = amed("compare", *common, "--nfe", 6, "--seeds", "0-1", "--samples", 2)
    assert code == 2
    assert "no solver spends 6 evaluations on these 5 noise levels" in err
    code, _, err = amed("sample", *common, "--rho", 3, "--out", tmp_path / "o.png")
    assert code == 2
    assert "rho" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no noise levels"),
        ("[]", "expected format 'amed_levels', version 1"),
        ('{"format": "amed_levels", "version": 2}', "expected format 'amed_levels', version 1"),
        ('{"format": "amed_levels", "version": 1}', "a plan must be a JSON object"),
        ('{"format": "amed_levels", "version": 1, "plan": {"solver": "euler", "sigmas": [1, 2]}}', "must decrease"),
        ('{"format": "amed_levels", "version": 1, "plan": {"solver": "euler", "sigmas": [2, NaN]}}', "finite"),
        (
            '{"format": "amed_levels", "version": 1, "plan": {"solver": "amed", "sigmas": [2, 1], "midpoint": true}}',
            "needs a predictor",
        ),
    ],
)
def test_a_file_that_holds_no_levels_is_named(tmp_path, text, message):
    file = tmp_path / "levels.json"
    file.write_text(text)
    with pytest.raises(FileFormatError, match=rf"levels\.json holds .*({message})|{message}"):
        read_levels(file)
    with pytest.raises(FileFormatError, match=r"none\.json is no file"):
        read_levels(tmp_path / "none.json")


def test_a_plan_with_a_predictor_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match="save the predictor"):
        write_levels(make_plan(5, solver="amed"), tmp_path / "levels.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("solver", ["euler", "heun", "ipndm", "deis", "dpmpp", "unipc"])
def test_those_that_extrapolate_in_log_sigma_are_warned_of(solver, caplog):
    search(solver=solver, samples=2, batch=2, grid=9)
    assert ("extrapolates in log sigma" in caplog.text) == (solver in ("dpmpp", "unipc"))


def test_levels_searched_about_the_mean_run_about_it_by_every_command(amed, tmp_path, tiny_conditional):
    save_model(tiny_conditional, tmp_path / "m.safetensors")
    common = ("--model", tmp_path / "m.safetensors", "--device", "cpu")
    levels = tmp_path / "levels.json"
    wished = ("--nfe", 3, "--solver", "euler", "--afs", "mean", "--grid", 9, "--samples", 4, "--out", levels)
    code, _, err = amed("search-schedule", *common, *wished)
    assert (code, err) == (0, "")
    plan = read_levels(levels)
    assert (plan.afs, plan.nfe, plan.mean) == ("mean", 3, measure_mean(tiny_conditional))
    assert Sampler(tiny_conditional, plan=levels).program.intervals == 4
    for nfe in ((), ("--nfe", 3)):
        code, out, _ = amed("sample", *common, "--schedule", levels, *nfe, "--seeds", 0, "--out", tmp_path / "o.png")
        assert code == 0
        assert out.startswith("euler, custom, 4 intervals, AFS about the mean")
    asked = ("--nfe", 3, "--seeds", 0, "--samples", 2, "--json", "-")
    code, out, _ = amed("compare", *common, "--schedule", levels, *asked)
    assert code == 0
    assert all("AFS about the mean" in row["plan"] for row in json.loads(out)["rows"])


def test_levels_of_a_file_that_leave_some_of_the_model_out_say_so(found, amed, tmp_path, tiny_conditional):
    tiny_conditional.sigma_max = 2560.0
    save_model(tiny_conditional, tmp_path / "wide.safetensors")
    common = ("--model", tmp_path / "wide.safetensors", "--device", "cpu", "--seeds", 0, "--out", tmp_path / "o.png")
    code, _, err = amed("sample", *common, "--schedule", found[1])
    assert code == 0
    assert "the model's noise levels are 2560 to" in err
    assert "this plan's 80 to" in err


def test_a_search_whose_nfe_forces_a_step_about_zero_says_so(caplog):
    search(mixture, nfe=3, solver="heun")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "heun spends 3 evaluations only where the first step is analytic" in record.message
