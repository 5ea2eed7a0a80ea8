"""A program written as a table, applied by hand, against the loop that runs the program."""

import math
from contextlib import suppress

import mixed
import pytest
import torch

from amed_engine import AMEDPredictor, ConfigError, Sampler, make_schedule, make_solver
from amed_engine.engine.export.tableau import basis_at
from amed_engine.engine.resolve import resolve
from amed_engine.engine.runner import BoundLoop
from amed_engine.engine.seeds import draw_all
from amed_engine.sampling.denoiser import bind_labels, mean_of_labels
from amed_engine.sampling.predictors import CoefficientPredictor
from amed_engine.serving.table import MAX_TICKS, NoTable, Table, tabulated
from amed_engine.solvers.program import Program
from amed_engine.solvers.stage import Midpoint

SEEDS, LABELS, HISTORY = [3, 4, 5], [0, 3, 1], 10
FIRST_STEPS = (False, True, "mean")
LEVELS = make_schedule("polynomial", 4, *mixed.SIGMAS)


@pytest.fixture(scope="module")
def model():
    return mixed.Classes(torch.float64)


def by_hand(table: Table, denoiser, latents, mean, noises):
    """[a_0, x, y] = C [x, y, D, a_1 ..], tick by tick in float64."""
    sources = torch.stack(
        [start * latents + shift * mean for start, shift in zip(table.start, table.shift, strict=True)]
    )
    for k in range(table.noises):
        sources[1 + table.noises - k] += noises[:, k]
    x, y, *past = sources
    mid = [torch.ones(len(latents), dtype=torch.float64)] * 4
    for matrix, sigma, interval in zip(table.coefficients, table.sigma, table.interval, strict=True):
        level = sigma.expand(len(latents)) if sigma > 0 else mid[0] * mid[3]
        answer, features = denoiser(y, level)
        if interval[0] > 0:
            r, c, time = table.predictor(features, *(edge.expand(len(latents)) for edge in interval))
            mid = [interval[1] ** r * interval[0] ** (1 - r), r, c, time]
        if table.predictor is not None:
            weights = [basis_at(1.0, *(float(part[b]) for part in mid[:3])) for b in range(len(latents))]
            matrices = torch.einsum("rcw,bw->brc", matrix, torch.tensor(weights, dtype=torch.float64))
        else:
            matrices = matrix.expand(len(latents), -1, -1)
        new, x, y = torch.einsum("brc,cb...->rb...", matrices, torch.stack([x, y, answer, *past]))
        past = [new, *past[:-1]]
    return y


@torch.no_grad()
def check(model, program, guidance=None):
    """Against the loop that `Sampler.run` runs; the images."""
    table = tabulated(program, HISTORY)
    assert table.ticks == program.nfe
    latents, _, noises = (part.double() for part in draw_all(SEEDS, mixed.SHAPE, mixed.CLASSES, program.noises))
    labels = torch.eye(mixed.CLASSES, dtype=torch.float64)[LABELS]
    ready = program.on(torch.device("cpu"), torch.float64)
    mean = torch.zeros(()) if ready.mean is None else mean_of_labels(ready.mean, labels, guidance)
    loop = BoundLoop(resolve(model), ready, guidance)
    expected = loop(latents, labels, noises if program.noises else None)
    got = by_hand(table, bind_labels(model, labels, guidance), latents, mean, noises)
    assert (got - expected).abs().max() < 1e-10 * expected.abs().max()
    return got


def plans(solver, options, midpoint):
    """Of 1 to 10 evaluations, with every first step; those of no whole number of intervals left out. A first step about a
    mean differs from one about zero in the start alone."""
    for afs in FIRST_STEPS:
        for nfe in (1, 2, 7, 10) if afs == "mean" else range(1, 11):
            said = {"solver": solver, "nfe": nfe, "afs": afs, "schedule": "polynomial"}
            with suppress(ConfigError):
                yield mixed.plan_of(said, options, midpoint=midpoint)


def named(case):
    return "-".join([case[0], *map(str, case[1].values())])


@pytest.mark.parametrize("case", mixed.TRAINING_FREE, ids=named)
def test_every_solver_folds_into_a_table(model, case):
    for plan in plans(*case, midpoint=False):
        check(model, plan.program())


@pytest.mark.parametrize("case", mixed.FIXED, ids=named)
def test_midpoints_that_are_numbers_fold_too(model, case):
    for plan in plans(*case, midpoint=True):
        check(model, plan.program(mixed.fixed(plan.intervals).choices()))


@pytest.mark.parametrize(
    ("case", "widths"),
    [
        *((case, (0.1, 0.2)) for case in mixed.LEARNED),
        *((mixed.LEARNED[k], widths) for k, widths in enumerate([(0.1, 0.0), (0.0, 0.3), (0.0, 0.0)])),
    ],
)
def test_a_predictor_goes_along_with_weights_on_the_basis(model, case, widths):
    predictor = mixed.learned(2, scale_dir=widths[0], scale_time=widths[1]).double()
    for plan in plans(*case, midpoint=True):
        check(model, plan.program(predictor))


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("intervals", range(2, 11))
def test_all_coefficients_learned_reach_as_far_back_as_there_are_ages(model, intervals, afs):
    levels = make_schedule("polynomial", intervals + 1, *mixed.SIGMAS)
    check(
        model, Program.build(make_solver("nonstationary"), levels, mixed.coefficients(levels, afs).choices(), afs=afs)
    )


@pytest.mark.parametrize("nfe", range(1, 11))
def test_fresh_noises_are_directions_that_are_there_before_the_first(model, nfe):
    check(model, Program.build(make_solver("consistency"), make_schedule("polynomial", nfe + 1, *mixed.SIGMAS)))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", [("ipndm", {}), ("unipc", {"max_order": 2}), ("heun", {})], ids=named)
def test_denoising_to_zero_is_one_tick_more(model, case, last):
    program = Program.build(make_solver(case[0], **case[1]), LEVELS, denoise_to_zero=last)
    table = tabulated(program, HISTORY)
    check(model, program)
    assert torch.equal(table.coefficients[-1, 2], torch.eye(3 + HISTORY, dtype=torch.float64)[2]) == last


@pytest.mark.parametrize("guidance", mixed.SCALES)
@pytest.mark.parametrize("afs", FIRST_STEPS)
def test_a_sampler_gives_what_the_table_gives(model, afs, guidance):
    """Under guidance too, which moves the mean that a class starts about."""
    plan = mixed.plan_of({"solver": "ipndm", "nfe": 3, "afs": afs, "schedule": "polynomial"}, {"max_order": 3})
    expected = Sampler(model, plan=plan, dtype=torch.float64, verify=False).run(SEEDS, LABELS, guidance).images
    assert (check(model, plan.program(), guidance) - expected).abs().max() < 1e-10 * expected.abs().max()


# ---- literal numbers


def test_ipndm_as_it_is_written_in_the_architecture():
    levels = torch.tensor([8.0, 4.0, 2.0, 1.0])
    table = tabulated(Program.build(make_solver("ipndm", max_order=2), levels), 2)
    assert table.sigma.tolist() == [8, 4, 2]
    assert table.start.tolist() == [8, 8, 0, 0]
    assert (table.shift.tolist(), table.noises, table.predictor) == ([0, 0, 0, 0], 0, None)
    # Columns x, y, D, a_1, a_2; y is x, so only x is read.
    moves = ([0.5, 0, 0.5, 0, 0], [0.25, 0, 0.75, 1, 0], [0.25, 0, 0.75, 0.5, 0])
    directions = ([0.125, 0, -0.125, 0, 0], [0.25, 0, -0.25, 0, 0], [0.5, 0, -0.5, 0, 0])
    for matrix, direction, move in zip(table.coefficients.tolist(), directions, moves, strict=True):
        assert matrix == [direction, move, move]


def test_an_analytic_first_step_is_part_of_the_start():
    """At sigma 4 about m: D = z·4 (1 - c) + c m, d = (4 z - D) / 4, and Euler goes on to sigma 3."""
    mean = torch.zeros(1, 1, 1, 1)
    program = Program.build(make_solver("euler"), torch.tensor([4.0, 3.0, 1.0]), afs="mean", mean=mean)
    table, c = tabulated(program, 1), 4 / math.sqrt(17)
    assert table.ticks == 1
    assert table.start.tolist()[:2] == pytest.approx([4 - c, 4 - c], rel=1e-15)
    assert table.shift.tolist()[:2] == pytest.approx([c / 4, c / 4], rel=1e-15)
    assert table.coefficients[0, 2].tolist() == pytest.approx([1 / 3, 0, 2 / 3, 0], rel=1e-15)


def test_an_amed_step_has_its_weights_on_the_basis():
    """y = x + (m - s) d = m/s x + (1 - m/s) D, told scale_time m; then x' = x + c h (y - D)/m."""
    predictor = AMEDPredictor(bottleneck=(2, 2))
    table = tabulated(Program.build(make_solver("amed"), torch.tensor([4.0, 1.0]), predictor), 1)
    assert (table.sigma.tolist(), table.interval.tolist()) == ([4, 0], [[4, 1], [0, 0]])
    middle, last = table.coefficients
    assert middle[2, 0].tolist() == [0, 0.25, 0, 0, 0, 0, 0, 0]
    assert middle[2, 2].tolist() == [1, -0.25, 0, 0, 0, 0, 0, 0]
    assert middle[1, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]  # the anchor stays
    assert last[2, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert last[2, 1].tolist() == [0, 0, 0, 0, 0, -3, 0, 0]  # y: c h / m
    assert last[2, 2].tolist() == [0, 0, 0, 0, 0, 3, 0, 0]


# ---- what is no table


def points():
    pair = Midpoint(*(torch.tensor(values) for values in ([0.3, 0.6], [0.5, 0.5], [1.0, 1.0])))
    return Program.build(make_solver("amed", points=2), LEVELS, [pair] * 3)


def adaptive():
    reads = CoefficientPredictor(3, mixed.SIGMAS[1], codes=1, inputs=8)
    return Program.build(make_solver("nonstationary"), LEVELS, reads.choices())


def long(nfe):
    return Program.build(make_solver("euler"), make_schedule("polynomial", nfe + 1, *mixed.SIGMAS))


def under(solver, **options):
    return Program.build(make_solver(solver), LEVELS, AMEDPredictor(bottleneck=(2, 2), **options))


def own_function(features, sigma, sigma_next):
    return Midpoint(0.5 * sigma / sigma, 1.0, 1.0)


REFUSED = {
    "points": (points, "several evaluation points at once"),
    "thresholding": (
        lambda: Program.build(make_solver("dpmpp", thresholding=True), LEVELS),
        "thresholding looks at a whole",
    ),
    "thresholding of unipc": (lambda: Program.build(make_solver("unipc", thresholding=True), LEVELS), "thresholding"),
    "adaptive coefficients": (adaptive, "depend on the sample otherwise than by a midpoint"),
    "wide scales": (lambda: under("amed", scales="wide"), "a plan cannot say 'wide' scales"),
    "logarithms of a midpoint": (lambda: under("dpmpp"), "no combination of"),
    "earlier midpoints": (lambda: under("deis"), "no combination of"),
    "hidden size": (lambda: under("amed", hidden_dim=64), "predictors of other sizes than"),
    "code size": (lambda: under("amed", bottleneck_dim=5), "predictors of other sizes than"),
    "embedding size": (lambda: under("amed", embedding_dim=16), "predictors of other sizes than"),
    "a function of one's own": (
        lambda: Program.build(make_solver("amed"), LEVELS, own_function),
        "only an AMEDPredictor goes into",
    ),
    "too long": (lambda: long(MAX_TICKS + 1), "65 evaluations are more than the 64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_table_says_why(case):
    make, reason = REFUSED[case]
    with pytest.raises(NoTable, match=reason):
        tabulated(make(), HISTORY)


def test_the_longest_table_has_room():
    assert tabulated(long(MAX_TICKS), 1).ticks == MAX_TICKS


@pytest.mark.parametrize(
    ("solver", "options", "needs"), [("ipndm", {}, 3), ("unipc", {"max_order": 2}, 2), ("euler", {}, 0)]
)
def test_directions_older_than_there_are_ages_are_refused(solver, options, needs):
    program = Program.build(make_solver(solver, **options), make_schedule("polynomial", 7, *mixed.SIGMAS))
    tabulated(program, max(needs, 1))
    if needs > 1:
        with pytest.raises(NoTable, match=f"a direction {needs} evaluations old is older than the {needs - 1}"):
            tabulated(program, needs - 1)


def test_more_noises_than_ages_are_refused():
    program = Program.build(make_solver("consistency"), LEVELS)
    assert tabulated(program, 2).noises == 2
    with pytest.raises(NoTable, match="2 fresh noises are more than the 1 directions"):
        tabulated(program, 1)
