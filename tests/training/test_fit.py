"""Fitted predictors: rows that reproduce every solver, Jacobians that are derivatives, fits that find what is known."""

import math
from dataclasses import replace

import pytest
import torch

from amed_engine import AMEDPredictor, ConfigError, Sampler, make_plan, zoo
from amed_engine.checkpoints import load_predictor, save_predictor
from amed_engine.engine.resolve import resolve
from amed_engine.sampling.denoiser import Denoised, bind_labels
from amed_engine.sampling.loop import integrate, sample
from amed_engine.sampling.predictors.coefficient import CoefficientPredictor
from amed_engine.sampling.predictors.constant import ConstantPredictor
from amed_engine.solvers import make_solver
from amed_engine.solvers.mean import Mean
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program
from amed_engine.solvers.stage import Midpoint, Row
from amed_engine.training.candidate import Constants, nonstationary, unrolled
from amed_engine.training.fit import Effort, Task, best_free, draw_examples, fit, learn, starts_of
from amed_engine.training.gauss_newton import Example, Normal, adaptive, gauss_newton, jacobian, loss_of

SHAPE = (1, 4, 4)


def mixture(x, sigma):
    """The exact denoiser of N(±0.5, 0.3²) in every pixel, with a bottleneck that shows the noise level."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    variance = 0.3**2 + sigma**2
    share = 0.3**2 / variance
    d = (1 - share) * 0.5 * torch.tanh(0.5 * x / variance) + share * x
    return Denoised(d, torch.cat([d, d * x / (1 + sigma**2).sqrt()], dim=1))


def latents(count, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def program_of(solver, options=None, nfe=5, afs=True, predictor=None):
    plan = make_plan(nfe, solver=solver, options=options, afs=afs, midpoint=predictor is not None)
    return Program.build(plan.make_solver(), plan.levels, predictor, afs=afs)


CLASSICAL = [
    ("euler", {}, 5, True),
    ("ipndm", {"max_order": 3}, 5, True),
    ("deis", {"max_order": 3}, 4, False),
    ("dpmpp", {}, 5, True),
    ("unipc", {}, 5, True),
    ("dpm", {}, 6, False),
]


@pytest.mark.parametrize(("solver", "options", "nfe", "afs"), CLASSICAL)
def test_every_solver_is_a_nonstationary_program(solver, options, nfe, afs):
    program = program_of(solver, options, nfe, afs)
    candidate = nonstationary(program, 0.002)
    x = latents(3) * 80
    expected = integrate(program.on(x.device, x.dtype), mixture, x)[-1]
    got = integrate(candidate.program(x), mixture, x)[-1]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert candidate.plan.nfe == nfe


def test_a_program_about_a_mean_is_one_that_combines_its_first_answer_too():
    rows = torch.full((1, *SHAPE), 0.3, dtype=torch.float64)
    mean = Mean.of(rows, classes=0, sigma=80.0, latents=1)
    plan = make_plan(5, solver="ipndm", mean=mean)
    candidate = nonstationary(plan.program(), 0.002, mean)
    assert (candidate.plan.afs, candidate.plan.mean, candidate.plan.nfe) == ("mean", mean, 5)
    x = latents(3) * 80
    expected = integrate(plan.program().on(x.device, x.dtype), mixture, x)[-1]
    torch.testing.assert_close(integrate(candidate.program(x), mixture, x)[-1], expected, rtol=1e-10, atol=1e-10)


def test_heun_evaluates_twice_at_a_level_and_cannot_be_one():
    rows, levels = unrolled(program_of("heun"))
    assert rows.shape == (6, 6)
    assert levels[0] == levels[1]
    with pytest.raises(ConfigError, match="sigmas must decrease"):
        nonstationary(program_of("heun"), 0.002).program(latents(1))


def test_constants_of_amed_unroll_too():
    mids = [Midpoint(0.3, 0.99, 0.9), Midpoint(0.6, 1.01, 1.0), Midpoint(0.4, 1.0, 1.1)]
    program = program_of("amed", predictor=mids)
    candidate = nonstationary(program, 0.002)
    x = latents(2) * 80
    expected = integrate(program.on(x.device, x.dtype), mixture, x)[-1]
    torch.testing.assert_close(integrate(candidate.program(x), mixture, x)[-1], expected, rtol=1e-10, atol=1e-10)


def test_a_predictor_that_listens_cannot_be_unrolled():
    with pytest.raises(ConfigError, match="freeze the predictor first"):
        unrolled(program_of("amed", predictor=AMEDPredictor()))


def planned():
    predictor = AMEDPredictor()
    predictor.plan = make_plan(5, solver="amed", afs=True)
    return predictor


def candidates():
    free = nonstationary(program_of("ipndm", {"max_order": 2}), 0.002)
    mean = Mean.of(torch.full((1, *SHAPE), 0.1), classes=0, sigma=80.0, latents=1)
    about = make_plan(5, solver="ipndm", mean=mean)
    constants = ConstantPredictor.of([Midpoint(0.4, 1.0, 0.95), Midpoint(0.5, 1.01, 1.0), Midpoint(0.6, 0.99, 1.05)])
    plan = make_plan(5, solver="amed", afs=True)
    epd = ConstantPredictor(2, 2)
    return {
        "nonstationary": free,
        "about a mean": nonstationary(about.program(), 0.002, mean),
        "constants": Constants(plan, constants),
        "epd": Constants(make_plan(5, solver="amed", options={"points": 2}, afs=True), epd),
    }


@pytest.mark.parametrize("name", ["nonstationary", "about a mean", "constants", "epd"])
def test_jacobians_are_central_differences_of_the_whole_trajectory(name):
    """Branching off in the middle of a trajectory must give what running it all gives."""
    candidate, x = candidates()[name], latents(2) * 80
    columns, _ = jacobian(candidate, Example(mixture, x, torch.zeros_like(x)))
    theta = candidate.theta()
    assert columns.shape == (2, 16, len(theta))
    for p in range(len(theta)):
        nudge = 1e-5 * (torch.arange(len(theta)) == p)
        ends = [integrate(candidate.at(theta + s * nudge).program(x), mixture, x)[-1].flatten(1) for s in (1, -1)]
        exact = (ends[0] - ends[1]) / 2e-5
        # One-sided differences over a finite nudge: a few per cent of curvature, on the scale of the column.
        error = (columns[:, :, p] - exact).abs().max()
        assert error < 0.1 * exact.abs().max() + 1e-6, f"number {p}: off by {error} of {exact.abs().max()}"


def test_columns_of_heads_are_derivatives_too():
    x = latents(3) * 80
    example = Example(mixture, x, torch.zeros_like(x))
    candidate = adaptive(nonstationary(program_of("euler", nfe=3), 0.002), [example], codes=2)
    columns, _ = jacobian(candidate, example)
    assert columns.shape == (3, 16, len(candidate.theta()))
    own, place = len(candidate.probes()), candidate.free.index((2, 1))
    ends = []
    for sign in (1, -1):
        moved = candidate.at(candidate.theta())
        with torch.no_grad():
            moved.predictor.heads[2, 1, 1] += sign * 1e-5
        ends.append(integrate(moved.program(x), mixture, x)[-1].flatten(1))
    exact = (ends[0] - ends[1]) / 2e-5
    got = columns[:, :, own + 2 * place + 1]
    assert (got - exact).abs().max() < 0.02 * exact.abs().max()


def test_the_fit_finds_the_coefficients_that_made_the_targets():
    """Targets from a known program of the same form: the loss falls to nothing, from another solver's coefficients."""
    truth = nonstationary(program_of("ipndm", {"max_order": 3}, nfe=3), 0.002)
    x = latents(32) * 80
    target = integrate(truth.program(x), mixture, x)[-1]
    start = nonstationary(program_of("euler", nfe=3), 0.002)
    start = replace(start, learn_sigmas=False)
    examples = [Example(mixture, x[:16], target[:16]), Example(mixture, x[16:], target[16:])]
    fitted = gauss_newton(start, examples, iterations=25, tolerance=1e-9)
    assert loss_of(fitted, examples) < 1e-4 * loss_of(start, examples)


def test_the_fit_never_raises_the_loss():
    x = latents(8) * 80
    example = Example(mixture, x, torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype))
    losses = [loss_of(candidates()["constants"], [example])]
    gauss_newton(
        candidates()["constants"], [example], iterations=4, tolerance=0, report=lambda _, loss: losses.append(loss)
    )
    assert len(losses) == 1 + 4
    assert losses == sorted(losses, reverse=True)


def test_a_step_is_a_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    columns, residual = (torch.randn(4, 5, *n, generator=generator, dtype=torch.float64) for n in ((3,), ()))
    normal = Normal()
    normal.add(columns[:2], residual[:2])
    normal.add(columns[2:], residual[2:])
    prior, offset = torch.tensor([0.0, 0.0, 2.0]).double(), torch.tensor([0.0, 0.0, 0.5]).double()
    step = normal.step(0.0, prior, offset)
    stacked = torch.cat([columns.reshape(-1, 3), prior.sqrt().diag()])
    right = torch.cat([-residual.reshape(-1), -(prior.sqrt() * offset)])
    torch.testing.assert_close(step, torch.linalg.lstsq(stacked, right).solution, rtol=1e-6, atol=1e-9)
    assert normal.step(0.0, prior, offset, fixed=[1])[1] == 0


@pytest.mark.parametrize("variant", ["constants", "epd", "nonstationary", "adaptive"])
def test_each_variant_beats_its_start_and_is_saved_whole(variant, tmp_path):
    model = resolve(mixture, shape=SHAPE)
    effort = Effort(samples=24, batch=12, early=2, late=2, teacher_nfe=20, seed=3)
    task = Task(variant, nfe=5, codes=2)
    examples, mean = draw_examples(model, task, effort)
    predictor = learn(model, task, effort, examples, mean=mean)
    save_predictor(predictor, tmp_path / "p.safetensors")
    loaded = load_predictor(tmp_path / "p.safetensors")
    assert loaded.plan == predictor.plan
    assert loaded.plan.nfe == 5
    (fresh,), _ = draw_examples(model, task, replace(effort, samples=64, batch=64, seed=4))
    drawn = Sampler(mixture, loaded, shape=SHAPE).run(fresh.x / 80).images
    start = starts_of(model, task, best_free(model, task, examples, 12))[0]
    assert (drawn - fresh.target).square().sum() < 0.5 * loss_of(start, [fresh])


def test_the_global_generators_are_left_alone():
    before = torch.get_rng_state()
    fit(mixture, variant="constants", shape=SHAPE, samples=8, teacher_nfe=8, early=0, late=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_adaptive_rows_differ_between_samples_and_are_bounded():
    x = latents(6) * 80
    example = Example(mixture, x, torch.zeros_like(x))
    candidate = adaptive(nonstationary(program_of("euler", nfe=3), 0.002), [example], codes=3)
    predictor = candidate.predictor
    with torch.no_grad():
        predictor.heads.fill_(0.1)
    features = mixture(x, torch.full((6,), 2.0, dtype=x.dtype)).features
    rows = predictor.choices()[1](features, torch.full((6,), 2.0), torch.full((6,), 1.0))
    assert isinstance(rows, Row)
    assert rows.a.shape == (6,)
    assert rows.b[0].unique().numel() == 6
    far = predictor.code(features * 1e6, 1)
    assert far.abs().max() < 3.0001


def test_a_frozen_predictor_says_the_mean_of_what_it_said():
    torch.manual_seed(0)
    predictor = AMEDPredictor(0.05, 0.2, bottleneck=(4, 4)).double()
    predictor.plan = make_plan(5, solver="amed", afs=True)
    z = latents(4)
    frozen = predictor.freeze(mixture, z)
    first = predictor(None, torch.tensor([80.0]).double(), predictor.plan.levels[1:2])
    assert frozen.plan == predictor.plan
    torch.testing.assert_close(frozen.r[0, 0], first.r[0], rtol=1e-12, atol=0)  # no features in an analytic first step
    one = predictor.freeze(mixture, z[:1])
    expected = sample(mixture, z[:1] * 80, predictor.plan.levels, make_solver("amed"), predictor, afs=True)
    got = sample(mixture, z[:1] * 80, predictor.plan.levels, make_solver("amed"), one.choices(), afs=True)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)  # one sample is its own mean


def test_one_run_serves_several_numbers_of_evaluations():
    one = {
        "variant": "nonstationary",
        "shape": SHAPE,
        "samples": 8,
        "early": 0,
        "late": 1,
        "teacher_nfe": 8,
        "progress": False,
    }
    many = fit(mixture, nfe=[3, 4], **one)
    assert {nfe: predictor.plan.nfe for nfe, predictor in many.items()} == {3: 3, 4: 4}
    alone = fit(mixture, nfe=4, **one)
    assert torch.equal(alone.coefficients, many[4].coefficients)


def test_latents_come_before_labels_from_one_generator(tiny_conditional):
    """The order that fits were made in: another one would change every fit of a seed."""
    model, effort = resolve(tiny_conditional), Effort(samples=10, batch=4, teacher_nfe=4, seed=5)
    task = Task("nonstationary", guidance_scale=2.0)
    generator = torch.Generator().manual_seed(5)
    for example, count in zip(draw_examples(model, task, effort)[0], (4, 4, 2), strict=True):
        x = torch.randn((count, 1, 8, 8), generator=generator) * 80.0
        labels = torch.nn.functional.one_hot(
            torch.randint(model.label_dim, (count,), generator=generator), model.label_dim
        )
        assert torch.equal(example.x, x)
        sigma = torch.full((count,), 80.0)
        expected = bind_labels(model.denoise, labels.float(), 2.0)(x, sigma)
        assert torch.equal(example.denoiser(x, sigma).x0, expected.x0)


QUICK = {
    "shape": SHAPE,
    "samples": 8,
    "batch": 4,
    "starts": 1,
    "early": 0,
    "late": 1,
    "teacher_nfe": 6,
    "progress": False,
}


def test_conditions_may_be_classes_tensors_or_denoisers(tiny_conditional):
    model, effort = resolve(tiny_conditional), Effort(samples=8, batch=4, teacher_nfe=4)
    dim = tiny_conditional.label_dim
    classes = [torch.arange(4) % dim, torch.zeros(4, dtype=torch.int64)]
    rows = [torch.nn.functional.one_hot(c, dim).float() for c in classes]
    bound = [lambda x, sigma, r=r: tiny_conditional(x, sigma, r) for r in rows]
    drawn = [draw_examples(model, Task("constants"), effort, c)[0] for c in (classes, rows, bound, classes[1:])]
    targets = [torch.cat([example.target for example in examples]) for examples in drawn]
    assert torch.equal(targets[0], targets[1])
    assert torch.equal(targets[0], targets[2])
    assert not torch.equal(targets[0][:4], targets[3][:4])
    assert torch.equal(targets[0][4:], targets[3][4:])


def test_every_condition_is_fitted_to_and_begun_anew():
    asked = []

    def prompt(name):
        def denoise(x, sigma):
            asked.append(name)
            return mixture(x, sigma)

        return denoise

    fit(mixture, nfe=3, conditions=[prompt("cat"), prompt("dog")], **QUICK | {"samples": 12})
    assert set(asked) == {"cat", "dog"}
    assert asked[:12] == ["cat"] * 6 + ["dog"] * 6  # the teacher's evaluations, batch by batch
    assert asked[12:18] == ["cat"] * 6


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ([], "conditions gave no batch; pass a list"),
        ([3], "conditions must give tensors or denoisers"),
        ([torch.zeros(2, 3)], "conditions gave 2 rows for a batch of 4"),
        ([torch.zeros(5, 3)], "conditions gave 5 rows for a batch of 4"),
        ([None], "conditions gave None for a batch"),
        (torch.zeros(8, 3), r"conditions give an entry for each batch, got one tensor \(8, 3\); pass a list"),
        ([1], "for each batch, got int; classes are a tensor of a number per sample"),
    ],
)
def test_conditions_that_cannot_be_used_are_named(conditions, message):
    with pytest.raises(ConfigError, match=message):
        fit(mixture, conditions=conditions, **QUICK)


def test_denoisers_that_would_be_cut_are_refused_before_any_network_runs():
    asked = []
    with pytest.raises(ConfigError, match=r"cannot be cut;.* samples that are a multiple of batch"):
        fit(mixture, conditions=[lambda x, sigma: asked.append(x)], **QUICK | {"samples": 10})
    assert asked == []


def test_the_plan_keeps_the_precision_of_the_network(tiny_model, tmp_path):
    predictor = fit(tiny_model, variant="constants", nfe=2, **QUICK | {"shape": None})
    save_predictor(predictor, tmp_path / "p.safetensors")
    assert load_predictor(tmp_path / "p.safetensors").plan.dtype == "float32"
    with pytest.raises(ConfigError, match=r"leave autocast=torch.bfloat16 out, or pass verify=False"):
        Sampler(tiny_model, predictor, autocast=torch.bfloat16)
    assert Sampler(tiny_model, predictor, autocast=torch.bfloat16, verify=False).plan == predictor.plan
    with pytest.raises(ConfigError, match=r"got one in float64.*convert the network, or pass verify=False"):
        Sampler(tiny_model.double(), replace_plan(predictor, model=None))


def replace_plan(predictor, **changes):
    predictor.plan = replace(predictor.plan, **changes)
    return predictor


def test_a_bundled_predictor_is_no_obstacle_to_autocast(monkeypatch):
    """Whoever did not choose the predictor cannot be told to choose another."""
    bundled = zoo.bundled_predictor("digits", 5)
    monkeypatch.setattr(zoo, "bundled_predictor", lambda *_: replace_plan(bundled, dtype="float32"))
    assert Sampler("digits", nfe=5, autocast=torch.bfloat16).plan.dtype == "float32"
    with pytest.raises(ConfigError, match=r"leave autocast=torch.bfloat16 out"):
        Sampler("digits", bundled, autocast=torch.bfloat16)


def test_freeze_draws_latents_for_a_network_that_tells_its_shape(tiny_model):
    predictor = AMEDPredictor(bottleneck=(4, 4))
    predictor.plan = make_plan(5, solver="amed", afs=True)
    frozen = predictor.freeze(tiny_model, 3)
    assert Sampler(tiny_model, frozen).run(2).images.isfinite().all()
    assert torch.equal(frozen.r, predictor.freeze(tiny_model, 3).r)


# ---- bad input


def test_a_predictor_of_another_kind_than_the_solver_needs():
    constants = ConstantPredictor(5)
    constants.plan = Plan("nonstationary", tuple(make_plan(5, solver="euler", afs=False).sigmas), midpoint=True)
    with pytest.raises(
        ConfigError,
        match="solver 'nonstationary' asks for a Row for every interval, which ConstantPredictor does not say",
    ):
        Sampler(mixture, constants, shape=SHAPE)
    free = candidates()["nonstationary"].predictor
    free.plan = make_plan(11, solver="amed", afs=True)
    with pytest.raises(
        ConfigError,
        match="solver 'amed' asks for a Midpoint for every interval, which CoefficientPredictor does not say",
    ):
        Sampler(mixture, free, shape=SHAPE)


def test_a_predictor_of_another_number_of_intervals():
    constants = ConstantPredictor(2)
    constants.plan = make_plan(5, solver="amed", afs=True)
    with pytest.raises(ConfigError, match="got a predictor of 2 intervals for 3 intervals"):
        Sampler(mixture, constants, shape=SHAPE)


def unasked(x, sigma):
    raise AssertionError("a fit that cannot be has evaluated the network")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantPredictor(0), "intervals must be an integer from 1 to"),
        (lambda: ConstantPredictor(2, 8), "points must be an integer from 1 to 7, got 8"),
        (lambda: CoefficientPredictor(16, 80.0), "intervals must be an integer from 1 to 15, got 16"),
        (lambda: CoefficientPredictor(3, 80.0, codes=-1), "codes and inputs must be integers"),
        (lambda: Task("best"), "variant must be one of constants, epd, nonstationary, adaptive; got 'best'"),
        (lambda: Task("nonstationary", solver="euler"), "leave solver, solver_options, schedule and rho out"),
        (lambda: Task("adaptive", schedule="logsnr"), "leave solver, solver_options, schedule and rho out"),
        (lambda: Task("adaptive", codes=0), "codes must be a number of components of at least 1, got 0"),
        (lambda: Effort(samples=0), "samples must be an integer of at least 8, got 0"),
        (lambda: AMEDPredictor().freeze(mixture, latents(1)), "freeze needs to know solver and noise levels"),
        (lambda: planned().freeze(mixture, 4), "freeze cannot draw 4 latents for this model"),
        (lambda: fit(mixture), "pass shape="),
        (lambda: fit(unasked, shape=SHAPE, nfe=15), "at most 15 intervals, got 16 for nfe=15"),
        (lambda: fit(unasked, shape=SHAPE, nfe=(3, 0)), "nfe must be a positive integer, got 0"),
        (lambda: fit(unasked, shape=SHAPE, variant="constants", solver="heun"), "takes no predictor"),
        (
            lambda: fit(mixture, shape=SHAPE, guidance_scale=2.0),
            "guidance_scale needs a class-conditional model",
        ),
        (
            lambda: fit(
                lambda x, s: mixture(x, s).x0,
                variant="adaptive",
                shape=SHAPE,
                samples=8,
                teacher_nfe=8,
                early=0,
                late=1,
            ),
            "returns no bottleneck features",
        ),
    ],
)
def test_what_cannot_work_says_why(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_noise_levels_stay_in_order():
    sigmas = nonstationary(program_of("euler"), 0.002)
    theta = sigmas.theta()
    theta[-1] = theta[-2] + math.log(1.001)
    assert sigmas.at(theta).collisions == {len(theta) - 2, len(theta) - 1}
    assert not sigmas.collisions
