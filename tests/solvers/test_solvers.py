"""Properties of the solvers: order, where and how often they evaluate, plugins, parallel points, gradients."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from amed_engine import AMEDPredictor, ConfigError, Midpoint, make_schedule, make_solver, sample
from amed_engine.sampling.denoiser import analytic_first_step, dynamic_thresholding, mean_of_labels, thresholded
from amed_engine.sampling.loop import integrate
from amed_engine.solvers import SOLVERS, integrator_names
from amed_engine.solvers.base import count_evaluations
from amed_engine.solvers.program import Program
from amed_engine.solvers.stage import Layout, Row, Stage, fold

SD = 0.5
HALF = Midpoint(torch.tensor(0.5))


def gaussian(x, sigma):
    """Posterior mean of N(0, SD²): the exact solution from sigma to s is x · sqrt((SD² + s²) / (SD² + sigma²))."""
    return x * (SD**2 / (SD**2 + sigma.view(-1, *[1] * (x.dim() - 1)) ** 2))


def curved(x, sigma):
    """A nonlinear denoiser with features, smooth in x."""
    denoised = torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1)))
    return denoised, denoised.expand(-1, 3, -1, -1)


class Recorder:
    """Remembers the noise levels told to the network and the points it was called at."""

    def __init__(self, denoiser=gaussian):
        self.denoiser, self.sigmas, self.points = denoiser, [], []

    def __call__(self, x, sigma):
        self.sigmas.append(sigma.clone())
        self.points.append(x.clone())
        return self.denoiser(x, sigma)


def global_error(solver, intervals, midpoint=None):
    sigmas = make_schedule("polynomial", intervals + 1, 0.1, 10.0, 7.0)
    x = torch.full((1, 1, 1, 1), 10.0, dtype=torch.float64)
    predictor = [midpoint] * intervals if midpoint is not None else None
    exact = 10 * math.sqrt((SD**2 + 0.1**2) / (SD**2 + 10.0**2))
    return abs(sample(gaussian, x, sigmas, solver, predictor).item() - exact)


ORDERS = [
    ("euler", {}, None, 1.0),
    ("heun", {}, None, 2.0),
    ("dpm", {}, None, 2.0),
    ("ipndm", {"max_order": 1}, None, 1.0),
    ("ipndm", {"max_order": 2}, None, 2.0),
    ("ipndm", {"max_order": 3}, None, 2.0),  # equal-step weights on unequal steps cost the third order
    ("ipndm", {"max_order": 4}, None, 2.0),
    ("deis", {"max_order": 2}, None, 2.0),
    ("deis", {"max_order": 3}, None, 2.9),
    ("deis", {"max_order": 3, "deis_mode": "rhoab"}, None, 2.9),
    ("dpmpp", {"max_order": 1}, None, 1.0),
    ("dpmpp", {"max_order": 2}, None, 2.0),
    ("dpmpp", {"max_order": 3}, None, 2.0),
    ("dpmpp", {"max_order": 3, "predict_x0": False}, None, 2.0),
    ("unipc", {"max_order": 1}, None, 2.0),
    ("unipc", {"max_order": 2}, None, 2.0),
    ("unipc", {"max_order": 3, "predict_x0": False, "variant": "bh1"}, None, 2.0),
    ("amed", {}, HALF, 2.0),
    ("euler", {}, HALF, 1.0),
    ("dpm", {}, HALF, 2.0),
    ("ipndm", {"max_order": 3}, HALF, 2.0),
    ("deis", {"max_order": 3}, HALF, 2.8),
    ("dpmpp", {"max_order": 3}, HALF, 2.0),
    ("unipc", {"max_order": 3}, HALF, 2.0),
]


@pytest.mark.parametrize(("name", "options", "midpoint", "order"), ORDERS)
def test_measured_order_of_convergence(name, options, midpoint, order):
    solver = make_solver(name, **options)
    coarse, fine = (global_error(solver, n, midpoint) for n in (160, 320))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


SIGMAS = make_schedule("polynomial", 4, 0.1, 10.0, 7.0)
MIDDLE = [(a * b).sqrt() for a, b in itertools.pairwise(SIGMAS)]
NODES = [s.item() for s in SIGMAS[:-1]]
HEUN_NODES = [s for pair in zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True) for s in pair]
REFINED = [s.item() for pair in zip(SIGMAS[:-1], MIDDLE, strict=True) for s in pair]


@pytest.mark.parametrize(
    ("name", "midpoint", "expected"),
    [
        *[(name, None, NODES) for name in ("euler", "ipndm", "deis", "dpmpp", "unipc")],
        ("heun", None, HEUN_NODES),
        ("dpm", None, REFINED),
        *[(name, HALF, REFINED) for name in ("amed", "euler", "dpm", "ipndm", "deis", "dpmpp", "unipc")],
    ],
)
def test_where_and_how_often_a_solver_evaluates(name, midpoint, expected):
    solver, recorder = make_solver(name), Recorder()
    x = torch.full((2, 1, 2, 2), 10.0, dtype=torch.float64)
    sample(recorder, x, SIGMAS, solver, [midpoint] * 3 if midpoint else None)
    assert all(sigma.shape == (2,) for sigma in recorder.sigmas)
    assert [sigma[0].item() for sigma in recorder.sigmas] == pytest.approx(expected, rel=1e-12)
    assert len(expected) == count_evaluations(solver, 3, midpoint=midpoint is not None)
    afs = Recorder()
    sample(afs, x, SIGMAS, solver, [midpoint] * 3 if midpoint else None, afs=True)
    assert [sigma[0].item() for sigma in afs.sigmas] == pytest.approx(expected[1:], rel=1e-12)


def test_amed_tells_the_network_one_noise_level_and_divides_by_another():
    recorder = Recorder(curved)
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64) * 10
    mid = Midpoint(torch.tensor([0.3, 0.6]), torch.tensor([1.01, 0.98]), torch.tensor([0.9, 1.1]))
    out = sample(recorder, x, SIGMAS[:2], make_solver("amed"), lambda features, s, s_next: mid)
    s, s_next = SIGMAS[0], SIGMAS[1]
    m = (s_next**mid.r * s ** (1 - mid.r)).double()
    column = [t.double().view(2, 1, 1, 1) for t in (m, mid.scale_dir, mid.scale_time)]
    d = (x - curved(x, s.expand(2))[0]) / s
    y = x + (column[0] - s) * d
    e = (y - curved(y, mid.scale_time * m)[0]) / column[0]
    torch.testing.assert_close(recorder.sigmas[1], mid.scale_time * m, rtol=1e-7, atol=0)
    torch.testing.assert_close(recorder.points[1], y, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out, x + column[1] * (s_next - s) * e, rtol=1e-6, atol=1e-6)


def test_parallel_points_run_as_one_batched_call_and_equal_the_formula():
    recorder = Recorder(curved)
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64) * 10
    mid = Midpoint(torch.tensor([0.3, 0.6]), torch.tensor([0.4, 0.62]), torch.tensor([0.9, 1.1]))
    solver = make_solver("amed", points=2)
    out = sample(recorder, x, SIGMAS[:2], solver, [mid])
    assert [len(p) for p in recorder.points] == [3, 6]
    s, s_next = SIGMAS[0], SIGMAS[1]
    d, expected = (x - curved(x, s.expand(3))[0]) / s, x
    for r, scale_dir, scale_time in zip(*(field.double() for field in mid), strict=True):
        m = s_next**r * s ** (1 - r)
        y = x + (m - s) * d
        expected = expected + scale_dir * (s_next - s) * (y - curved(y, (scale_time * m).expand(3))[0]) / m
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert count_evaluations(solver, 2, midpoint=True, afs=True) == 5


def test_one_parallel_point_is_amed():
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64) * 10
    mids = [Midpoint(torch.tensor(r), torch.tensor(1.01), torch.tensor(0.95)) for r in (0.3, 0.5, 0.7)]
    twice = [Midpoint(m.r.expand(2), (m.scale_dir / 2).expand(2), m.scale_time.expand(2)) for m in mids]
    once = sample(curved, x, SIGMAS, make_solver("amed"), mids)
    torch.testing.assert_close(
        sample(curved, x, SIGMAS, make_solver("amed", points=2), twice), once, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", ["euler", "ipndm", "deis", "dpmpp", "unipc"])
def test_a_plugin_with_plain_numbers_is_the_rule_on_the_refined_grid(name):
    solver = make_solver(name)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64) * 10
    refined = torch.tensor([*REFINED, SIGMAS[-1].item()], dtype=torch.float64)
    plugin = sample(curved, x, SIGMAS, solver, [HALF] * 3)
    torch.testing.assert_close(plugin, sample(curved, x, refined, solver), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["amed", "euler", "dpm", "ipndm", "deis", "dpmpp", "unipc"])
def test_static_midpoints_equal_a_predictor_that_says_the_same(name):
    solver = make_solver(name)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64) * 10
    mid = Midpoint(*(torch.tensor(v, dtype=torch.float64) for v in (0.4, 1.02, 0.9)))
    per_sample = Midpoint(*(field.expand(2) for field in mid))
    learned = sample(curved, x, SIGMAS, solver, lambda features, s, s_next: per_sample, afs=True)
    torch.testing.assert_close(learned, sample(curved, x, SIGMAS, solver, [mid] * 3, afs=True), rtol=1e-11, atol=1e-12)


def test_samples_are_independent_of_their_batch():
    predictor = AMEDPredictor(0.01, 0.2, bottleneck=(4, 4)).double()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64) * 10
    for name in ("amed", "ipndm", "dpmpp"):
        whole = sample(curved, x, SIGMAS, make_solver(name), predictor)
        one_by_one = torch.cat([sample(curved, row[None], SIGMAS, make_solver(name), predictor) for row in x])
        torch.testing.assert_close(whole, one_by_one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["amed", "dpm", "ipndm", "deis", "dpmpp", "unipc"])
def test_gradients_through_the_loop(name):
    torch.manual_seed(0)
    solver, predictor = make_solver(name), AMEDPredictor(0.05, 0.2, bottleneck=(2, 2)).double()
    weights = dict(predictor.named_parameters())
    x = (torch.randn(2, 1, 2, 2, dtype=torch.float64) * 2).requires_grad_()
    sigmas = torch.tensor([2.0, 0.7, 0.3], dtype=torch.float64)
    chosen = ("fc_r.weight", "fc_scale_dir.bias", "fc_scale_time.bias")

    def loop(x, *values):
        def learned(features, s, s_next):
            return torch.func.functional_call(
                predictor, weights | dict(zip(chosen, values, strict=True)), (features, s, s_next)
            )

        return sample(curved, x, sigmas, solver, learned)

    assert torch.autograd.gradcheck(loop, (x, *(weights[name].detach().requires_grad_() for name in chosen)))


def test_gradients_reach_constant_midpoints():
    r = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    sigmas = torch.tensor([2.0, 0.7, 0.3], dtype=torch.float64)

    def loop(r):
        return sample(curved, x, sigmas, make_solver("amed"), [Midpoint(r[0]), Midpoint(r[1])])

    assert torch.autograd.gradcheck(loop, (r,))


@pytest.mark.parametrize("name", ["dpmpp", "unipc"])
def test_data_prediction_is_thresholded_where_that_is_asked_for(name):
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64) * 10
    wide = lambda x, sigma: 3 * gaussian(x, sigma)  # noqa: E731
    off = make_solver(name)
    on = sample(wide, x, SIGMAS, make_solver(name, thresholding=True))
    torch.testing.assert_close(on, sample(thresholded(wide), x, SIGMAS, off), rtol=0, atol=0)
    assert not torch.allclose(on, sample(wide, x, SIGMAS, off))
    assert not off.thresholds
    assert not make_solver(name, predict_x0=False, thresholding=True).thresholds


@pytest.mark.parametrize(("mu", "sd"), [(0.0, 1.0), (2.0, 4.0)])
@pytest.mark.parametrize("name", integrator_names("none", "optional"))
def test_data_that_leave_minus_one_to_one_are_not_clipped(name, mu, sd):
    def exact(x, sigma):
        s = sigma.view(-1, 1, 1, 1) ** 2
        return mu + (x - mu) * sd**2 / (sd**2 + s)

    x = torch.randn(64, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 80
    images = sample(exact, x, make_schedule("polynomial", 121, 0.002, 80.0, 7.0), make_solver(name))
    assert images.std().item() == pytest.approx(sd, rel=0.03)
    assert images.mean().item() == pytest.approx(mu, abs=0.05 * sd)


def test_dynamic_thresholding_equals_its_definition():
    x0 = torch.randn(3, 2, 5, 5, dtype=torch.float64) * torch.tensor([0.1, 1.0, 4.0]).view(3, 1, 1, 1)
    s = torch.quantile(x0.abs().flatten(1), 0.995, dim=1).clamp_min(1).view(3, 1, 1, 1)
    torch.testing.assert_close(dynamic_thresholding(x0), x0.clamp(-s, s) / s, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mean", [None, torch.full((1, 1, 4, 4), 6.5, dtype=torch.float64)], ids=["zero", "mean"])
def test_the_analytic_first_step_is_exact_for_unit_variance_about_its_mean(mean):
    """With sigma + 1 the variance of x: the answer of N(m, 1), to the square of 1 / sigma."""
    x, sigma = torch.randn(2, 1, 4, 4, dtype=torch.float64) * 80, torch.tensor([80.0, 80.0], dtype=torch.float64)
    m = 0 if mean is None else mean
    exact = m + (x - m) / (1 + 80**2)
    # 1 - s / sqrt(1 + s²) = 1 / (2 s²) and not 1 / s²: half of what the data's own variance adds is missing.
    close = m + (x - m) * (1 - 80 / math.sqrt(1 + 80**2))
    answer = analytic_first_step(x, sigma, mean).x0
    torch.testing.assert_close(answer, close, rtol=1e-9, atol=1e-12)
    assert (answer - exact).abs().max() < 0.03


def test_a_first_step_about_the_mean_is_that_of_the_data_moved_to_zero():
    """D'(x) = D(x + m) - m from x - m with a step about zero, moved back."""
    m = torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 80
    levels = make_schedule("polynomial", 6, 0.002, 80.0, 7.0)

    def at_home(x, sigma):
        return curved(x - m, sigma)[0] + m

    for name in integrator_names("none", "optional"):
        about = sample(at_home, x, levels, make_solver(name), afs="mean", mean=m)
        zero = sample(curved, x - m, levels, make_solver(name), afs=True) + m
        torch.testing.assert_close(about, zero, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("afs", "mean"), [("mean", None), (True, torch.zeros(1, 1, 4, 4)), (False, torch.zeros(1, 1, 4, 4))]
)
def test_a_mean_goes_with_its_first_step_alone(afs, mean):
    with pytest.raises(ConfigError, match="a mean answer goes with"):
        sample(gaussian, torch.ones(1, 1, 4, 4), SIGMAS, make_solver("euler"), afs=afs, mean=mean)


def test_the_mean_of_labels_is_the_expectation_of_guided_answers():
    rows = torch.randn(4, 2, 3, dtype=torch.float64)
    labels = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0.25, 0.75]], dtype=torch.float64)
    torch.testing.assert_close(mean_of_labels(rows, labels, None)[:2], rows[[1, 0]])
    torch.testing.assert_close(mean_of_labels(rows, labels, None)[2], 0.25 * rows[2] + 0.75 * rows[3])
    guided = rows[0] + 3 * (rows[1] - rows[0])
    torch.testing.assert_close(mean_of_labels(rows, labels, 3.0)[0], guided)
    assert torch.equal(mean_of_labels(rows, None, 3.0), rows[:1])
    any_class = mean_of_labels(rows[:2], labels, 3.0)
    torch.testing.assert_close(any_class, torch.stack([guided, rows[0], guided]))


def test_a_mean_that_is_given_counts_before_the_program_s_own_and_without_one():
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 80
    own, given = (torch.full((1, 1, 4, 4), value, dtype=torch.float64) for value in (2.0, -7.0))
    program = Program.build(make_solver("euler"), SIGMAS[:2], afs="mean", mean=own)
    expected = sample(curved, x, SIGMAS[:2], make_solver("euler"), afs="mean", mean=given)
    for bare in (program, replace(program, mean=None)):
        assert torch.equal(integrate(bare, curved, x, mean=given)[-1], expected)
    zero = Program.build(make_solver("euler"), SIGMAS[:2], afs=True)
    assert torch.equal(integrate(zero, curved, x, mean=given)[-1], integrate(zero, curved, x)[-1])


def test_rows_of_several_classes_need_to_know_which():
    program = Program.build(make_solver("euler"), SIGMAS, afs="mean", mean=torch.zeros(3, 1, 4, 4, dtype=torch.float64))
    with pytest.raises(ConfigError, match="the mean answer of each sample's class, which is not known here"):
        integrate(program, gaussian, torch.ones(1, 1, 4, 4, dtype=torch.float64))


def test_the_analytic_first_step_is_exact_for_unit_variance_far_away():
    x, sigma = torch.randn(2, 1, 4, 4, dtype=torch.float64) * 80, torch.tensor([80.0, 80.0], dtype=torch.float64)
    direction = (x - analytic_first_step(x, sigma).x0) / 80
    torch.testing.assert_close(direction, x / math.sqrt(1 + 80**2), rtol=1e-12, atol=0)


def test_denoise_to_zero_adds_one_evaluation_at_the_last_level():
    recorder = Recorder()
    x = torch.full((1, 1, 1, 1), 10.0, dtype=torch.float64)
    states = sample(recorder, x, SIGMAS, make_solver("euler"), denoise_to_zero=True, trajectory=True)
    assert states.shape[0] == 5
    torch.testing.assert_close(states[-1], gaussian(states[-2], SIGMAS[-1:]), rtol=1e-12, atol=0)
    assert recorder.sigmas[-1].item() == pytest.approx(0.1)


def test_low_precision_states_keep_float32_coefficients():
    x = torch.randn(2, 1, 4, 4).bfloat16() * 10
    program = Program.build(make_solver("ipndm"), SIGMAS).on(x.device, x.dtype)
    assert program.sigmas.dtype == torch.float32
    assert sample(gaussian, x, SIGMAS, make_solver("ipndm")).dtype == torch.bfloat16


def test_fold_equals_applying_the_rows_one_by_one():
    generator = torch.Generator().manual_seed(1)
    x, y, d, old = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    sigma = torch.tensor(0.7, dtype=torch.float64)
    anchor, point = Row(0.9, (0.2, -0.3)), Row(torch.tensor([1.1, 0.8], dtype=torch.float64), (0.5, 0.0))
    update = fold(Stage((point,), anchor), Layout((sigma,), False, 1, False), keep=2)
    columns = [(x, y, d, old)[j] for j in update.columns]
    got = torch.einsum("mjb,jbn->mbn", update.coeffs.expand(-1, -1, 2), torch.stack(columns))
    direction = (y - d) / sigma
    expected = [direction, 0.9 * x + 0.2 * direction - 0.3 * old, point.a[:, None] * x + 0.5 * direction]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_dpm_solver_2_at_one_half_neither_keeps_nor_reads_its_first_direction():
    program = Program.build(make_solver("dpm"), SIGMAS)
    assert program.updates is not None
    first, second = program.updates[0]
    assert (first.new_directions, first.keep, len(second.columns)) == (0, 0, 3)


def test_every_solver_says_whether_it_takes_midpoints():
    assert {name for name in SOLVERS if make_solver(name).takes_predictor == "none"} == {"heun", "consistency"}
    assert {name for name in SOLVERS if make_solver(name).takes_predictor == "required"} == {"amed", "nonstationary"}


@pytest.mark.parametrize("name", ["euler", "amed", "unipc"])
def test_the_loop_exports_with_a_dynamic_batch(name):
    predictor = AMEDPredictor(0.01, 0.2, bottleneck=(4, 4)).eval()

    learned = predictor if name == "amed" else None
    program = Program.build(make_solver(name), SIGMAS, learned, afs=True).on(torch.device("cpu"), torch.float32)

    class Loop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.predictor = predictor

        def forward(self, x):
            return integrate(program, curved, x)[-1]

    x = torch.randn(4, 1, 4, 4) * 10
    exported = torch.export.export(Loop(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    other = torch.randn(7, 1, 4, 4) * 10
    torch.testing.assert_close(exported.module()(other), Loop()(other))


@pytest.mark.parametrize(
    ("points", "middle", "got"),
    [
        (2, Midpoint(0.5), "a number"),
        (3, Midpoint(torch.full((3,), 0.5), 1 / 3, torch.ones(3)), "a number"),
        (3, Midpoint(*(torch.ones(2) / 2,) * 3), "got 2"),
    ],
)
def test_parallel_points_need_an_entry_each(points, middle, got):
    with pytest.raises(ConfigError, match=rf"needs {points} leading entries .*{got}"):
        Program.build(make_solver("amed", points=points), SIGMAS, [middle] * (len(SIGMAS) - 1))


def test_as_many_points_as_one_update_can_read():
    """Seven equal points are one; an eighth would need seventeen sources."""
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 80
    count = len(SIGMAS) - 1

    def denoise(x, sigma):
        return x / (1 + sigma.reshape(-1, 1) ** 2)

    seven = [Midpoint(torch.full((7,), 0.4), torch.full((7,), 1 / 7), torch.ones(7))] * count
    together = sample(denoise, x, SIGMAS, make_solver("amed", points=7), seven)
    alone = sample(denoise, x, SIGMAS, make_solver("amed"), [Midpoint(torch.tensor(0.4))] * count)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="points must be an integer from 1 to 7, got 8"):
        make_solver("amed", points=8)
