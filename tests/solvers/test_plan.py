"""Plans: what they cost, and that JSON gives them back and nothing else."""

import json

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from amed_engine import Plan, make_plan, make_solver
from amed_engine.errors import ConfigError
from amed_engine.sampling.loop import sample
from amed_engine.solvers.mean import Mean
from amed_engine.solvers.plan import best_training_free, own_range
from amed_engine.solvers.stage import Midpoint

orders = st.integers(1, 3)
OPTIONS = {
    "euler": st.just({}),
    "heun": st.just({}),
    "dpm": st.fixed_dictionaries({}, optional={"r": st.floats(0.01, 1)}),
    "ipndm": st.fixed_dictionaries({}, optional={"max_order": st.integers(1, 4)}),
    "deis": st.fixed_dictionaries({}, optional={"max_order": orders, "deis_mode": st.sampled_from(["tab", "rhoab"])}),
    "dpmpp": st.fixed_dictionaries({}, optional={"max_order": orders, "predict_x0": st.booleans()}),
    "unipc": st.fixed_dictionaries({}, optional={"max_order": orders, "variant": st.sampled_from(["bh1", "bh2"])}),
    "amed": st.fixed_dictionaries({}, optional={"points": st.integers(1, 4)}),
}
solvers = st.sampled_from(sorted(OPTIONS)).flatmap(lambda name: st.tuples(st.just(name), OPTIONS[name]))
numbers = st.floats(min_value=1e-6, max_value=1e6, allow_nan=False)


@st.composite
def means(draw, sigma: float) -> Mean:
    classes = draw(st.integers(0, 3))
    rows = draw(st.sampled_from(sorted({1 + classes, 1 + min(classes, 1)})))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    facts = {"classes": classes, "latents": draw(st.integers(1, 64)), "dtype": draw(st.none() | st.just("float32"))}
    return Mean.of(torch.randn(rows, 2, 3, generator=generator), sigma=sigma, **facts)


@st.composite
def plans(draw) -> Plan:
    name, options = draw(solvers)
    sigmas = sorted(draw(st.lists(numbers, min_size=2, max_size=8, unique=True)), reverse=True)
    afs = draw(st.sampled_from([False, True, "mean"]))
    return Plan(
        solver=name,
        sigmas=tuple(sigmas),
        schedule=draw(st.sampled_from(["custom", "polynomial", "logsnr", "time_uniform"])),
        rho=draw(st.none() | numbers),
        options=tuple(sorted(options.items())),
        afs=afs,
        mean=draw(st.none() | means(sigmas[0])) if afs == "mean" else None,
        denoise_to_zero=draw(st.booleans()),
        midpoint=draw(st.booleans()) or name == "amed",
        guidance_scale=draw(st.none() | st.floats(0, 20)),
        model=draw(st.none() | st.text(alphabet="0123456789abcdef", min_size=64, max_size=64)),
        dtype=draw(st.none() | st.sampled_from(["float32", "bfloat16"])),
    )


ROWS = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
MEAN = Mean.of(ROWS, classes=3, sigma=80.0, latents=32)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ENTRIES = sorted(set(Plan("euler", (2.0, 1.0)).to_json()) - {"version"})


# ---- JSON


@given(plans())
def test_json_gives_the_plan_back(plan):
    text = json.dumps(plan.to_json(), allow_nan=False)
    again = Plan.from_json(json.loads(text))
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.nfe == plan.nfe
    assert json.dumps(again.to_json()) == text


@settings(max_examples=20)  # each is flushed to the disk
@given(plan=plans())
def test_a_file_gives_the_plan_back(tmp_path_factory, plan):
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert json.loads(path.read_text()) == plan.to_json()


def check_refused_or_sound(data) -> None:
    """Either a ConfigError, or a plan that can be asked what it costs and written again."""
    try:
        plan = Plan.from_json(data)
    except ConfigError:
        return
    assert isinstance(plan.nfe, int)
    assert all(a > b > 0 for a, b in zip(plan.sigmas, plan.sigmas[1:], strict=False))
    hash(plan)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@settings(max_examples=50)
@given(anything)
def test_json_of_anything_is_no_plan(data):
    with pytest.raises(ConfigError, match=r"a plan must be a JSON object|unknown entries|plan lacks"):
        Plan.from_json(data)


@given(plans(), st.sampled_from(ENTRIES), anything)
@example(Plan("euler", (2.0, 1.0)), "sigmas", [10**400, 1])
@example(Plan("dpm", (2.0, 1.0)), "options", {"r": "half"})
@example(Plan("dpm", (2.0, 1.0)), "options", {"r": None})
@example(Plan("dpmpp", (2.0, 1.0)), "options", {"thresholding": [1]})
@example(Plan("euler", (2.0, 1.0)), "afs", True)
@example(Plan("euler", (2.0, 1.0)), "mean", {"data": ""})
@example(Plan("euler", (2.0, 1.0)), "rho", 10**400)
@example(Plan("euler", (2.0, 1.0)), "guidance_scale", float("nan"))
def test_one_wrong_entry_is_refused_as_a_config_error(plan, name, value):
    check_refused_or_sound({**plan.to_json(), name: value})


@settings(max_examples=50)
@given(plans(), st.dictionaries(st.text(max_size=6), anything, min_size=1, max_size=3))
def test_unknown_solver_options_are_refused(plan, options):
    assume(not set(options) & set(getattr(type(plan.make_solver()), "__dataclass_fields__", {})))
    with pytest.raises(ConfigError, match="has no option"):
        Plan.from_json({**plan.to_json(), "options": {**dict(plan.options), **options}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "plan has unknown entries colour; expected afs, denoise_to_zero, dtype, guidance_scale"),
        ({"solver": None}, "plan entry 'solver' has type NoneType, expected str"),
        ({"solver": "rk4"}, "unknown solver 'rk4'; valid names: euler, heun, dpm"),
        ({"sigmas": 3}, "plan entry 'sigmas' has type int, expected list"),
        ({"sigmas": [2, "1"]}, "plan entry 'sigmas' must be a list of numbers"),
        ({"sigmas": [2, True]}, "plan entry 'sigmas' must be a list of numbers"),
        ({"sigmas": [1, 2]}, "sigmas must decrease"),
        ({"sigmas": [*range(20_000, 0, -1)]}, "plan entry 'sigmas' has 20000 numbers, more than the 10000"),
        ({"sigmas": []}, "sigmas must be a vector of at least 2 noise levels"),
        ({"sigmas": [float("inf"), 1]}, "sigmas must be finite"),
        ({"afs": 1}, "plan entry 'afs' has type int, expected bool"),
        ({"afs": "zero"}, "plan entry 'afs' has type str, expected bool"),
        ({"mean": None}, "plan has unknown entries mean; plans without a version have none"),
        ({"midpoint": "yes"}, "plan entry 'midpoint' has type str, expected bool"),
        ({"rho": True}, "plan entry 'rho' has type bool"),
        ({"rho": "7"}, "plan entry 'rho' has type str, expected int or float"),
        ({"schedule": "zigzag"}, "plan entry 'schedule' must be custom, polynomial, .*; got 'zigzag'"),
        ({"guidance_scale": "2"}, "plan entry 'guidance_scale' has type str"),
        ({"options": [["r", 1]]}, "plan entry 'options' has type list, expected dict"),
        ({"options": {"max_order": 9}}, "ipndm: max_order must be an integer from 1 to 4, got 9"),
        ({"options": {"max_order": "2"}}, "ipndm: max_order must be an integer from 1 to 4, got '2'"),
        ({"solver": "dpmpp", "options": {"predict_x0": "no"}}, "dpmpp: predict_x0 must be"),
        ({"solver": "dpm", "options": {"r": "half"}}, "dpm: r must be in"),
        ({"solver": "unipc", "options": {"variant": "bh3"}}, "unipc: variant must be one of bh1, bh2; got 'bh3'"),
        ({"model": 5}, "plan entry 'model' has type int"),
        ({"dtype": 5}, "plan entry 'dtype' has type int"),
    ],
    ids=repr,
)
def test_from_json_names_the_bad_entry(changes, message):
    with pytest.raises(ConfigError, match=message):
        Plan.from_json({"solver": "ipndm", "sigmas": [80, 1, 0.002], **changes})


@pytest.mark.parametrize("missing", ["solver", "sigmas"])
def test_from_json_names_what_is_missing(missing):
    data = Plan("euler", (2.0, 1.0)).to_json()
    data.pop(missing)
    with pytest.raises(ConfigError, match=f"plan lacks {missing}"):
        Plan.from_json(data)


# ---- cost

# Evaluations of 3 intervals, with a predictor's midpoint in each or without.
ALONE = {"euler": 3, "heun": 6, "dpm": 6, "ipndm": 3, "deis": 3, "dpmpp": 3, "unipc": 3}
WITH_MIDPOINT = {"euler": 6, "dpm": 6, "ipndm": 6, "deis": 6, "dpmpp": 6, "unipc": 6, "amed": 6}


@pytest.mark.parametrize(
    ("solver", "midpoint", "cost"),
    [(name, False, n) for name, n in ALONE.items()] + [(name, True, n) for name, n in WITH_MIDPOINT.items()],
)
@pytest.mark.parametrize("afs", [False, True], ids=["", "afs"])
@pytest.mark.parametrize("to_zero", [False, True], ids=["", "to_zero"])
def test_nfe_of_three_intervals(solver, midpoint, cost, afs, to_zero):
    plan = Plan(solver, (80.0, 8.0, 1.0, 0.1), afs=afs, midpoint=midpoint, denoise_to_zero=to_zero)
    assert plan.intervals == 3
    assert plan.nfe == cost - afs + to_zero


@pytest.mark.parametrize("points", [1, 2, 3, 7])
def test_parallel_points_cost_one_evaluation_each(points):
    plan = Plan("amed", (80.0, 1.0, 0.1), options=(("points", points),), midpoint=True)
    assert plan.nfe == 2 * (1 + points)


@given(solvers, st.integers(1, 13), st.sampled_from([None, True, False]), st.booleans())
def test_make_plan_spends_exactly_the_nfe_or_says_why_not(solver, nfe, afs, midpoint):
    name, options = solver
    made = make_solver(name, **options)
    midpoint = made.takes_predictor == "required" or (midpoint and made.takes_predictor != "none")
    cost = made.evaluations(midpoint)
    if all((nfe + free) % cost for free in ([0, 1] if afs is None else [int(afs)])):
        with pytest.raises(ConfigError, match="not a whole number of intervals"):
            make_plan(nfe, solver=name, options=options, afs=afs, midpoint=midpoint)
        return
    plan = make_plan(nfe, solver=name, options=options, afs=afs, midpoint=midpoint)
    assert plan.nfe == nfe
    assert plan.midpoint == midpoint
    assert afs is None or plan.afs == afs
    assert plan.sigmas[0] == pytest.approx(80)
    assert plan.sigmas[-1] == pytest.approx(0.002)


@pytest.mark.parametrize(("solver", "nfe"), [("heun", 5), ("amed", 5), ("dpm", 3)])
def test_without_a_measured_mean_the_analytic_first_step_is_taken_where_the_nfe_leaves_no_other_choice(solver, nfe):
    assert make_plan(nfe, solver=solver).afs is True


@pytest.mark.parametrize(("solver", "nfe"), [("euler", 5), ("ipndm", 4), ("heun", 4), ("amed", 6)])
def test_and_the_first_evaluation_is_the_network_s_elsewhere(solver, nfe):
    assert make_plan(nfe, solver=solver).afs is False


@pytest.mark.parametrize(
    ("solver", "nfe", "afs"), [("euler", 5, "mean"), ("heun", 5, "mean"), ("heun", 4, False), ("amed", 5, "mean")]
)
def test_a_measured_mean_is_started_about_where_the_nfe_allows(solver, nfe, afs):
    plan = make_plan(nfe, solver=solver, mean=MEAN)
    assert (plan.afs, plan.nfe, plan.mean) == (afs, nfe, MEAN if afs else None)
    assert make_plan(nfe, solver="euler", mean=MEAN, afs=True).mean is None


@pytest.mark.parametrize("afs", ["MEAN", 1, 0.0], ids=repr)
def test_a_first_step_that_is_none_is_refused(afs):
    with pytest.raises(ConfigError, match="afs must be True, False, 'mean' or None, got"):
        make_plan(5, solver="euler", afs=afs)


def test_the_message_lists_only_possible_nfes_and_all_of_them():
    options = {"points": 2}  # 3 evaluations per interval: 2, 3, 5, 6 ... with or without the analytic first step
    with pytest.raises(ConfigError, match=r"possible are ([\d, ]+)") as caught:
        make_plan(4, solver="amed", options=options)
    listed = [int(n) for n in str(caught.value).split("possible are ")[1].split(", ...")[0].split(", ")]
    for n in range(1, max(listed) + 1):
        if n in listed:
            assert make_plan(n, solver="amed", options=options).nfe == n
        else:
            with pytest.raises(ConfigError):
                make_plan(n, solver="amed", options=options)


def test_given_levels_decide_the_nfe():
    levels = torch.tensor([80.0, 10, 1, 0.1])
    assert make_plan(None, solver="euler", schedule=levels).nfe == 3
    assert make_plan(3, solver="euler", schedule=levels).afs is False
    assert make_plan(2, solver="euler", schedule=levels).afs is True
    assert make_plan(None, solver="amed", schedule=levels, afs=True).nfe == 5
    with pytest.raises(ConfigError, match="4 noise levels cost 3 evaluations with euler, but nfe=5 was asked"):
        make_plan(5, solver="euler", schedule=levels)


@pytest.mark.parametrize("nfe", [0, -1, True, 5.0, "5", float("nan")], ids=repr)
def test_an_nfe_that_is_no_count_is_refused(nfe):
    with pytest.raises(ConfigError, match="nfe must be a positive integer, got"):
        make_plan(nfe, solver="euler")


ONE_MEAN = Mean.of(torch.zeros(1, 1, 2, 2), sigma=80.0, classes=0, latents=32, model=None, dtype=None)


@pytest.mark.parametrize(
    ("nfe", "afs", "mean", "first", "solver"),
    [
        (5, False, None, False, ("deis", 3)),
        (5, None, None, False, ("deis", 3)),
        (7, False, ONE_MEAN, False, ("deis", 3)),
        (8, False, ONE_MEAN, False, ("ipndm", 3)),
        (10, True, None, True, ("ipndm", 3)),
        (8, None, ONE_MEAN, "mean", ("unipc", 2)),
        (5, "mean", None, "mean", ("unipc", 2)),
        (8, "mean", ONE_MEAN, "mean", ("unipc", 2)),
    ],
)
def test_the_default_solver_depends_on_the_first_step(nfe, afs, mean, first, solver):
    plan = best_training_free(nfe, afs=afs, mean=mean)
    assert (plan.solver, dict(plan.options)["max_order"], plan.schedule) == (*solver, "polynomial")
    assert (plan.nfe, plan.afs) == (nfe, first)
    assert plan.mean == (mean if first == "mean" else None)
    assert best_training_free(nfe, afs=afs, mean=mean, schedule="logsnr").schedule == "logsnr"


@pytest.mark.parametrize("nfe", [0, True, 5.0, "5"], ids=repr)
def test_also_by_the_default_solver(nfe):
    with pytest.raises(ConfigError, match="nfe must be a positive integer, got"):
        best_training_free(nfe)


def test_a_plan_does_not_change():
    plan = make_plan(5, solver="ipndm", options={"max_order": 2})
    with pytest.raises(AttributeError):
        plan.afs = False
    plan.to_json()["sigmas"].append(0.0)
    plan.levels[0] = 1
    assert plan == make_plan(5, solver="ipndm", options={"max_order": 2})


def test_the_name_of_files_and_commands_is_explained():
    with pytest.raises(ConfigError, match="got 'zero'; files' and commands' zero is True here"):
        make_plan(5, solver="euler", afs="zero")
    with pytest.raises(ConfigError, match='must be false, "zero" or "mean", got true'):
        Plan.from_json({**make_plan(5, solver="euler").to_json(), "afs": True})


def test_a_models_own_range_counts_and_the_published_one_where_it_has_no_end():
    assert own_range(0, float("inf")) == (0.002, 80)
    assert own_range(0.1, 20) == (0.1, 20)
    assert own_range(4e-5, 2560) == (4e-5, 2560)
    for bad in [(5, 2), (100, float("inf")), (-1, 80), (float("nan"), 80), (0.002, 0.001)]:
        with pytest.raises(ConfigError, match="need sigma_min < sigma_max"):
            own_range(*bad)


@pytest.mark.parametrize(
    ("solver", "options", "nfe", "afs"),
    [
        *[("amed", {"points": points}, 2 * (1 + points) - afs, afs) for points in (1, 2, 3) for afs in (False, True)],
        *[("ipndm", {}, 5, True), ("heun", {}, 6, False), ("unipc", {}, 4, False)],
    ],
)
def test_rounds_and_evaluations_are_what_the_network_sees(solver, options, nfe, afs):
    plan, calls = make_plan(nfe, solver=solver, options=options, afs=afs), []

    def denoiser(x, sigma):
        calls.append(len(x))
        return x / 2

    points = options.get("points", 1)
    mid = Midpoint(*(torch.full((points,), v, dtype=torch.float64) for v in (0.5, 1 / points, 1.0)))
    scalar = Midpoint(*(field[0] for field in mid))
    choices = [mid if points > 1 else scalar] * plan.intervals if plan.midpoint else None
    sample(denoiser, torch.ones(3, 1, 2, 2).double(), plan.levels, plan.make_solver(), choices, afs=afs)
    assert (len(calls), sum(calls)) == (plan.rounds, 3 * plan.nfe)
    assert ("rounds" in plan.describe()) is (plan.rounds != plan.nfe)


def test_describe_is_one_line_with_what_matters():
    text = make_plan(5, solver="ipndm", options={"max_order": 2}, midpoint=True).describe()
    assert text == "ipndm max_order=2 + predictor, time_uniform, 3 intervals, AFS, NFE 5"
    text = make_plan(5, solver="unipc", mean=MEAN).describe()
    assert text == (
        "unipc max_order=3 thresholding=False, time_uniform, 6 intervals, AFS about the mean of 32 latents and class, NFE 5"
    )


# ---- versions of the file


def test_a_file_says_every_option_and_is_read_by_no_default():
    data = make_plan(5, solver="dpmpp").to_json()
    assert data["version"] == 2
    assert data["options"] == {"lower_order_final": True, "max_order": 3, "predict_x0": True, "thresholding": False}
    del data["options"]["thresholding"]
    with pytest.raises(
        ConfigError, match="lacks thresholding; version 2 says every option, by default thresholding=False"
    ):
        Plan.from_json(data)
    with pytest.raises(ConfigError, match="a plan of version 3 is not known here, where 2 is the newest"):
        Plan.from_json({**data, "version": 3})


def test_plans_that_say_the_same_are_equal_however_many_options_were_named():
    named = make_plan(5, solver="dpmpp", options={"max_order": 3, "thresholding": False})
    assert named == make_plan(5, solver="dpmpp")
    assert hash(named) == hash(make_plan(5, solver="dpmpp"))


# As they were written before plans had versions.
OLD = {"sigmas": [80.0, 9.0, 0.002], "schedule": "polynomial", "rho": 7.0, "afs": True, "denoise_to_zero": False}


@pytest.mark.parametrize(
    ("solver", "options", "meant"),
    [
        ("dpmpp", {}, True),
        ("unipc", {"max_order": 2}, True),
        ("dpmpp", {"thresholding": False}, False),
        ("unipc", {"thresholding": True}, True),
    ],
)
def test_a_file_without_a_version_keeps_its_meaning(tmp_path, solver, options, meant):
    (tmp_path / "old.json").write_text(json.dumps({"solver": solver, "options": options, "midpoint": False, **OLD}))
    plan = Plan.load(tmp_path / "old.json")
    assert plan.make_solver().thresholds is meant
    assert (plan.afs, plan.mean, plan.nfe) == (True, None, 1)
    plan.save(tmp_path / "new.json")
    assert Plan.load(tmp_path / "new.json") == plan
    new = json.loads((tmp_path / "new.json").read_text())
    assert (new["afs"], new["options"]["thresholding"]) == ("zero", meant)


def test_an_old_file_of_a_solver_without_thresholding_is_what_it_says():
    plan = Plan.from_json({"solver": "ipndm", "options": {"max_order": 2}, **OLD, "afs": False})
    assert plan == make_plan(2, solver="ipndm", options={"max_order": 2}, schedule=plan.levels).__class__(
        "ipndm", (80.0, 9.0, 0.002), "polynomial", 7.0, (("max_order", 2),)
    )


# ---- the mean answer


def test_a_mean_comes_back_to_the_last_bit(tmp_path):
    plan = make_plan(5, solver="euler", mean=MEAN)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.mean == MEAN
    assert torch.equal(again.mean.rows(), ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [2, 2]}, "has 12 bytes, expected 4"),
        ({"shape": []}, "must be a list of sizes"),
        ({"shape": [1 << 40]}, "must be a list of sizes"),
        ({"shape": [1 << 20, 2]}, "must have at most"),
        ({"classes": 5}, "has 12 bytes"),
        ({"classes": -1}, "whole classes and latents"),
        ({"sigma": "80"}, "'mean.sigma' must be a noise level"),
        ({"sigma": 0}, "'mean.sigma' must be a noise level"),
        ({"data": "?"}, "is no base64"),
        ({"data": 3}, "must be texts"),
        ({"data": "AADAfwAAwH8AAMB/"}, "NaN or infinite"),
        ({"model": 3}, "must be texts"),
        ({"colour": 1}, "must be an object of classes, data"),
    ],
    ids=repr,
)
def test_a_mean_that_is_none_is_refused(changes, message):
    data = {
        "data": "AACAPwAAAEAAAEBA",
        "shape": [1, 1],
        "classes": 2,
        "sigma": 80,
        "latents": 4,
        "model": None,
        "dtype": None,
    }
    assert Mean.from_json(data).rows().flatten().tolist() == [1, 2, 3]
    with pytest.raises(ConfigError, match=message):
        Mean.from_json({**data, **changes})


def test_a_mean_of_too_many_numbers_is_refused():
    with pytest.raises(ConfigError, match="is more than the 1048576 that are kept"):
        Mean.of(torch.zeros(2, 3, 512, 512), classes=1, sigma=80.0, latents=1)


def test_a_mean_belongs_to_its_first_step_and_noise_level():
    with pytest.raises(
        ConfigError,
        match="with afs='zero' from sigma 80 has no use for the mean answer at 80; make it None, null in a file",
    ):
        Plan("euler", (80.0, 1.0), afs=True, mean=MEAN)
    with pytest.raises(ConfigError, match="from sigma 10 has no use for the mean answer at 80"):
        Plan("euler", (10.0, 1.0), afs="mean", mean=MEAN)
    with pytest.raises(ConfigError, match="yet to be measured: Sampler"):
        make_plan(5, solver="euler", afs="mean").program()
