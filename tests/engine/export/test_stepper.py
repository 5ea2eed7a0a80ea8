"""Tables say the same as the program they came from, and files of other content are refused."""

import copy
import json
import math
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amed_engine import Midpoint, Sampler, make_plan, make_schedule, make_solver, sample
from amed_engine.engine.export import read_plan as plan_file
from amed_engine.engine.export import tableau
from amed_engine.engine.export.stepper import Stepper, dynamic_thresholding
from amed_engine.engine.export.write_plan import make_tableau, write_plan
from amed_engine.engine.export.write_schedule import write_schedule
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.kernels.layout import MAX_OUTPUTS, MAX_SOURCES
from amed_engine.solvers.program import Program
from amed_engine.solvers.schedule import DiscreteTime


def run(plan, x, denoise, **options) -> np.ndarray:
    stepper = Stepper(plan, x, **options)
    while not stepper.done:
        stepper.advance(denoise(stepper.points, stepper.sigma))
    return stepper.result


# ---- numbers


def test_same_kernels_give_the_same_bits(case, tools, same_kernels):
    plan = plan_file.loads(case.plan.dumps())
    assert plan == case.plan
    assert plan.nfe == case.program.nfe
    np.testing.assert_array_equal(run(plan, case.x, tools.on_numpy, combine=same_kernels), case.truth)


def test_plain_numpy_is_right_to_rounding(case, tools):
    """Every update of the walk against float64: one rounding for each product and each sum."""
    plain, errors = Stepper(case.plan, case.x)._combine, []

    def combine(sources, coeffs, outputs):
        plain(sources, coeffs, outputs)
        stacked = np.stack([source.astype(np.float64) for source in sources])
        wide = coeffs[..., 0].astype(np.float64)
        error = np.abs(np.stack(outputs) - np.tensordot(wide, stacked, 1))
        errors.append((error / np.tensordot(np.abs(wide), np.abs(stacked), 1)).max() / len(sources))

    got = run(case.plan, case.x, tools.on_numpy, combine=combine)
    assert got.dtype == np.float32
    assert max(errors) <= np.finfo(np.float32).eps


def test_double_precision_agrees_to_rounding(case, tools):
    x = torch.from_numpy(case.x).double()
    program = case.program
    truth = sample(tools.denoise, x, tools.SIGMAS, program.solver, program.predictor, **tools.keywords(program))
    got = run(case.plan, x.numpy(), tools.on_numpy)
    np.testing.assert_allclose(got, truth.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", ["dpmpp", "unipc"])
@pytest.mark.parametrize("afs", [False, True])
def test_thresholding_is_the_engine_s(tools, same_kernels, solver, afs):
    """To one rounding: torch interpolates the quantile with a fused multiply-add where it vectorizes."""
    program = Program.build(make_solver(solver, thresholding=True), tools.SIGMAS, afs=afs)
    x = tools.latents()
    truth = sample(tools.denoise, x, tools.SIGMAS, program.solver, afs=afs).numpy()
    got = run(make_tableau(program), x.numpy(), tools.on_numpy, combine=same_kernels)
    np.testing.assert_allclose(got, truth, atol=3e-7 * np.abs(truth).max())


@given(size=st.integers(1, 40), seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 30.0]))
@settings(max_examples=60)
def test_thresholds_at_the_quantile(size, seed, scale):
    x = np.random.default_rng(seed).normal(size=(3, size)) * scale
    s = np.maximum(np.quantile(np.abs(x), 0.995, axis=1, keepdims=True), 1)
    np.testing.assert_allclose(dynamic_thresholding(np, x), np.clip(x, -s, s) / s, rtol=1e-12)


@pytest.mark.parametrize(("solver", "options"), [("amed", {}), ("dpm", {}), ("euler", {}), ("ipndm", {"max_order": 3})])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_predictor_goes_along(tools, solver, options, afs, last):
    predictor, x = tools.predictor().double(), tools.latents().double()
    program = Program.build(make_solver(solver, **options), tools.SIGMAS, predictor, afs=afs, denoise_to_zero=last)
    plan = plan_file.loads(make_tableau(program).dumps())
    with torch.no_grad():
        keywords = {"afs": afs, "denoise_to_zero": last}
        truth = sample(tools.denoise_with_features, x, tools.SIGMAS, program.solver, predictor, **keywords)
    stepper, spread = Stepper(plan, x.numpy()), 0.0
    while not stepper.done:
        sigma = torch.from_numpy(stepper.sigma)
        spread = max(spread, float(sigma.max() - sigma.min()))
        denoised, features = tools.denoise_with_features(torch.from_numpy(stepper.points), sigma)
        stepper.advance(denoised.numpy(), features.numpy())
    assert spread > 0, "every sample has its own midpoint"
    np.testing.assert_allclose(stepper.result, truth.numpy(), rtol=1e-7, atol=1e-8)


def test_a_frozen_predictor_is_asked_with_features_of_zero(tools, same_kernels):
    predictor = tools.predictor().requires_grad_(False)
    program = Program.build(make_solver("ipndm"), tools.SIGMAS, predictor)
    said = [predictor.double()(None, s[None], t[None]) for s, t in zip(tools.SIGMAS, tools.SIGMAS[1:], strict=False)]
    constants = [Midpoint(*(field.squeeze() for field in mid)) for mid in said]
    frozen = make_tableau(program, freeze=True)
    assert frozen.predictor is None
    assert frozen.evaluations == make_tableau(Program.build(make_solver("ipndm"), tools.SIGMAS, constants)).evaluations


def test_midpoints_that_were_being_trained_are_frozen(tools):
    numbers = [Midpoint(torch.tensor(0.4, dtype=torch.float64), 1.01, 0.98)] * 3
    trained = [mid._replace(r=mid.r.clone().requires_grad_()) for mid in numbers]
    with pytest.raises(ConfigError, match="freeze=True"):
        make_tableau(Program.build(make_solver("amed"), tools.SIGMAS, trained))
    frozen = make_tableau(Program.build(make_solver("amed"), tools.SIGMAS, trained), freeze=True)
    assert frozen == make_tableau(Program.build(make_solver("amed"), tools.SIGMAS, numbers))


@pytest.mark.parametrize("solver", ["deis", "dpmpp", "unipc"])
def test_coefficients_of_another_kind_are_refused(tools, solver):
    program = Program.build(make_solver(solver), tools.SIGMAS, tools.predictor())
    with pytest.raises(ConfigError, match="freeze=True"):
        make_tableau(program)


def test_a_sampler_and_its_plan_draw_the_same_images(tmp_path, same_kernels):
    def denoise(x, sigma):
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    sampler = Sampler(denoise, solver="ipndm", nfe=5, shape=(3, 4, 4))
    noise = torch.randn(2, 3, 4, 4)
    plan = write_plan(sampler, tmp_path / "plan.json")
    assert plan_file.read_plan(tmp_path / "plan.json") == plan
    assert plan.shape == (3, 4, 4)
    assert plan.description == sampler.plan.describe()
    x = (noise * torch.tensor(plan.sigmas[0], dtype=torch.float32)).numpy()
    got = run(plan, x, lambda y, s: denoise(torch.from_numpy(y), torch.from_numpy(s)).numpy(), combine=same_kernels)
    np.testing.assert_array_equal(got, sampler.run(noise).images.numpy())


def test_the_bundled_predictor_s_images(tmp_path):
    """A real network with its bottleneck: the plan with weights against the sampler."""
    sampler = Sampler("digits", nfe=5)
    plan, seeds = make_tableau(sampler), [0, 1, 2]
    truth = sampler.run(seeds, class_labels=3).images
    from amed_engine.engine.request import make_request

    request = make_request(sampler.model, seeds, 3, None, dtype=torch.float32, device=torch.device("cpu"))
    stepper = Stepper(plan, (request.latents * plan.sigmas[0]).numpy())
    while not stepper.done:
        with torch.no_grad():
            points, sigma = torch.from_numpy(stepper.points), torch.from_numpy(stepper.sigma)
            denoised, features = sampler.model.denoise(points, sigma, request.labels)
        stepper.advance(denoised.numpy(), features.numpy())
    np.testing.assert_allclose(stepper.result, truth.numpy(), atol=2e-4)


# ---- the table for diffusers


def test_the_schedule_is_edm_s(tools, tmp_path):
    program = tools.program("amed", refined=True)
    table = write_schedule(program, tmp_path / "schedule.json")
    assert table == json.loads((tmp_path / "schedule.json").read_text())
    r, s = torch.tensor([0.3, 0.4, 0.5]).double(), tools.SIGMAS
    m = s[1:] ** r * s[:-1] ** (1 - r)
    levels = [*torch.stack([s[:-1], m], 1).flatten().tolist(), float(s[-1])]
    told = [*torch.stack([s[:-1], 0.98 * m], 1).flatten().tolist(), float(s[-1])]
    assert table["sigmas"] == pytest.approx(levels, rel=1e-7)
    assert table["timesteps"] == pytest.approx([0.25 * math.log(t) for t in told], abs=1e-7)
    assert table["scale_dir"] == [1.01] * 3


def test_the_schedule_of_a_discrete_model_counts_its_steps(tmp_path):
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    grid = ((1 - alphas) / alphas).sqrt()
    program = Program.build(make_solver("euler"), grid[[999, 600, 250, 3]])
    table = write_schedule(program, tmp_path / "schedule.json", alphas_cumprod=alphas)
    assert table["timesteps"] == pytest.approx([999, 600, 250, 3], abs=1e-6)
    assert DiscreteTime.of(alphas).sigma(torch.tensor([1.0])).item() == pytest.approx(float(grid[999]))


def test_parallel_points_have_no_schedule(tools, tmp_path):
    with pytest.raises(ConfigError, match="parallel points"):
        write_schedule(tools.program("epd", refined=True), tmp_path / "schedule.json")


# ---- files


def test_limits_are_the_kernels():
    assert (tableau.MAX_ROWS, tableau.MAX_COLUMNS) == (MAX_OUTPUTS, MAX_SOURCES)


def test_reading_and_stepping_need_no_torch(tmp_path):
    sigmas = make_schedule("polynomial", 3, 0.002, 80.0)
    program = Program.build(make_solver("ipndm"), sigmas)
    write_plan(program, tmp_path / "plan.json")
    write_schedule(program, tmp_path / "schedule.json")
    code = (
        "import sys, numpy as np\n"
        "from amed_engine import Stepper, read_plan, read_schedule\n"
        "read_schedule(sys.argv[2])\n"
        "s = Stepper(read_plan(sys.argv[1]), np.ones((1, 2), np.float32))\n"
        "while not s.done: s.advance(s.points / 2)\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    files = (tmp_path / "plan.json", tmp_path / "schedule.json")
    done = subprocess.run([sys.executable, "-P", "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BAD = {
    "another format": lambda d: d.update(format="other"),
    "a newer version": lambda d: d.update(version=3),
    "an unknown entry": lambda d: d.update(extra=1),
    "an entry less": lambda d: d.pop("sigmas"),
    "a wrong count": lambda d: d.update(nfe=99),
    "no evaluations": lambda d: d.update(evaluations=[]),
    "a level of zero": lambda d: d["evaluations"][0].update(sigma=[0.0]),
    "a negative level": lambda d: d.update(sigmas=[80.0, -1.0]),
    "a column that is not there": lambda d: d["evaluations"][0].update(columns=[0, 7]),
    "columns in disorder": lambda d: d["evaluations"][1]["columns"].reverse(),
    "a row too short": lambda d: d["evaluations"][0]["coefficients"][0].pop(),
    "a row too many": lambda d: d["evaluations"][0]["coefficients"].append([1.0, 1.0]),
    "a huge coefficient": lambda d: d["evaluations"][0]["coefficients"][0].__setitem__(0, 1e300),
    "text for a number": lambda d: d["evaluations"][0]["coefficients"][0].__setitem__(0, "1"),
    "true for a number": lambda d: d["evaluations"][0]["coefficients"][0].__setitem__(0, True),
    "directions from nowhere": lambda d: d["evaluations"][0].update(keep=5),
    "more directions than points": lambda d: d["evaluations"][0].update(new_directions=2, keep=2),
    "two points and one level": lambda d: d["evaluations"][1].update(sigma=[3.0, 2.0], sigma_net=[3.0, 2.0]),
    "an anchor that both moves and stays": lambda d: d["evaluations"][0].update(moves_x=False),
    "a predictor that is absent": lambda d: d["evaluations"][0].update(predict=[3.0, 2.0]),
    "a level for nobody to choose": lambda d: d["evaluations"][1].update(sigma=None, sigma_net=None),
    "weights on nothing": lambda d: d["evaluations"][1]["coefficients"][0].__setitem__(0, [1.0] * 8),
    "a flag that is a number": lambda d: d["evaluations"][0].update(x_is_y=1),
    "a shape with a hole": lambda d: d.update(shape=[3, 0]),
}


@pytest.fixture
def data(tools) -> dict:
    return json.loads(make_tableau(tools.program("ipndm")).dumps())


@pytest.mark.parametrize("name", BAD)
def test_bad_plans_are_refused_by_both_readers(data, name, request):
    plan_file.loads(json.dumps(data))
    bad = copy.deepcopy(data)
    BAD[name](bad)
    with pytest.raises(FileFormatError, match="expected"):
        plan_file.loads(json.dumps(bad))
    library = request.getfixturevalue("library")
    with pytest.raises(Exception, match=r"plan entry|expected") as caught:
        library.parse(json.dumps(bad))
    assert caught.value.status == 2


VALUES = [0, 1, 2, 3, 7, 16, 17, 65536, 65537, -1, 0.5, 1e30, 1e31, -0.25, None, True, "x", [], [1], {}, [80.0, 9.0]]


def change(data: dict, rng: random.Random) -> None:
    """One entry somewhere below becomes another value, its neighbour's, or nothing; or it is there twice."""
    node: Any = data
    while True:
        key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not (isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.9):
            break
        node = node[key]
    action = rng.random()
    if action < 0.6:
        node[key] = copy.deepcopy(rng.choice(VALUES))
    elif action < 0.8:
        node[key] = copy.deepcopy(node[rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))])
    elif action < 0.9 or isinstance(node, dict):
        del node[key]
    else:
        node.insert(key, copy.deepcopy(node[key]))


def verdict(read, text: str) -> tuple[Any, str]:
    try:
        return read(text), "accepted"
    except Exception as error:
        return None, f"refused: {error}"


def test_both_readers_accept_the_same_plans(tools, library):
    """Plans with one or two entries changed, removed, repeated or exchanged."""
    learned = Program.build(make_solver("ipndm", max_order=2), tools.SIGMAS, tools.predictor(hidden_dim=2), afs=True)
    programs = [tools.program("dpmpp", afs=True, last=True), tools.program("epd", refined=True), learned]
    plans, rng, accepted = [json.loads(make_tableau(p).dumps()) for p in programs], random.Random(0), 0
    for k in range(1500):
        data = copy.deepcopy(plans[k % 3])
        for _ in range(rng.randint(1, 2)):
            change(data, rng)
        text = json.dumps(data)
        (_, python), (plan, c) = verdict(plan_file.loads, text), verdict(library.parse, text)
        library.raw.amed_plan_free(plan)
        assert python.partition(":")[0] == c.partition(":")[0], (k, python, c, text[:3000])
        accepted += c == "accepted"
    assert 100 < accepted < 1400, "changes must neither be harmless nor always fatal"


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 5000, '"\\ud800"'])
def test_text_that_is_no_plan_is_refused_by_both_readers(text, library):
    with pytest.raises(FileFormatError):
        plan_file.loads(text)
    with pytest.raises(Exception, match=r"JSON|object") as caught:
        library.parse(text)
    assert caught.value.status == 2


def test_errors_name_the_file(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(FileFormatError, match=r"x\.json"):
        plan_file.read_plan(tmp_path / "x.json")
    with pytest.raises(FileFormatError, match="does not exist"):
        plan_file.read_plan(tmp_path / "y.json")


def test_a_host_s_mistakes_are_named(tools):
    plan, x = make_tableau(tools.program("euler")), tools.latents().numpy()
    with pytest.raises(ConfigError, match="float32 or float64"):
        Stepper(plan, x.astype(np.int64))
    for other in (torch.from_numpy(x), x.tolist()):
        with pytest.raises(ConfigError, match=r"x must be an array of numpy, got \w+; numpy.from_dlpack"):
            Stepper(plan, other)
        with pytest.raises(ConfigError, match="denoised must be an array of numpy"):
            Stepper(plan, x).advance(other)
    stepper = Stepper(plan, x)
    with pytest.raises(ConfigError, match="done"):
        _ = stepper.result
    with pytest.raises(ConfigError, match="denoised must be"):
        stepper.advance(x[:1])
    with pytest.raises(ConfigError, match="denoised must be"):
        stepper.advance(x.astype(np.float64))
    for _ in range(plan.nfe):
        stepper.advance(x)
    with pytest.raises(ConfigError, match="at its end"):
        stepper.advance(x)


def test_a_recipe_in_the_place_of_a_table_is_named(tmp_path):
    make_plan(5, solver="ipndm").save(tmp_path / "recipe.json")
    with pytest.raises(FileFormatError, match=r"recipe\.json.*this is a recipe, of Plan\.save"):
        plan_file.read_plan(tmp_path / "recipe.json")
