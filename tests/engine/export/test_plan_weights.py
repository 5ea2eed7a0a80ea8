"""Coefficients under an AMED predictor, as plans write them: the formula's own weights, or a refusal."""

from dataclasses import dataclass
from fractions import Fraction
from operator import add, mul, sub, truediv

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amed_engine import AMEDPredictor, ConfigError, make_schedule, make_solver
from amed_engine.engine.export.expression import Expression, NoExpression
from amed_engine.engine.export.tableau import BASIS
from amed_engine.engine.export.write_plan import make_tableau
from amed_engine.solvers import AMED
from amed_engine.solvers.multistep import IPNDM
from amed_engine.solvers.program import Program
from amed_engine.solvers.stage import Row, Stage

SIGMAS = make_schedule("polynomial", 4, 0.002, 80.0)


def written(solver, sigmas=SIGMAS, **options):
    predictor = AMEDPredictor(0.1, 0.2, bottleneck=(3, 3), hidden_dim=4)
    return make_tableau(Program.build(solver, sigmas, predictor, **options)).evaluations


def on(**weights) -> tuple[float, ...]:
    """Weights on BASIS, by names for its functions."""
    names = ("one", "m", "by_m", "c", "cm", "c_by_m", "c_by_r", "c_by_rm")
    assert len(names) == len(BASIS)
    return tuple(float(weights.get(name, 0.0)) for name in names)


def to_midpoint(s: float) -> tuple:
    """y = x + (m - s) (x - D) / s over x and D."""
    return on(m=1 / s), on(one=1, m=-1 / s)


def check(evaluations, expected):
    """columns and coefficients of every evaluation, to the last bit; every second one is at the predictor's level."""
    assert [(e.columns, e.coefficients) for e in evaluations] == expected
    assert [e.sigma is None for e in evaluations] == [e.sigma_net is None for e in evaluations]
    assert [e.sigma is None for e in evaluations] == [False, True] * (len(expected) // 2)
    assert [e.predict for e in evaluations[1::2]] == [None] * (len(expected) // 2)


def intervals():
    return list(zip(SIGMAS.tolist(), SIGMAS[1:].tolist(), strict=False))


def test_amed_is_written_as_its_formula():
    """x' = x + c (t - s) (y - D) / m."""
    expected = []
    for s, t in intervals():
        expected += [((0, 1), (to_midpoint(s),)), ((0, 1, 2), ((1.0, on(c_by_m=t - s), on(c_by_m=s - t)),))]
    check(written(make_solver("amed")), expected)


@pytest.mark.parametrize("options", [{}, {"r": 0.3}])
def test_dpm_is_written_as_its_formula(options):
    """x' = x + c h [e / (2r) + (1 - 1 / (2r)) d], h = t - s, e = (y - D) / m, d = (x - D_s) / s kept from before."""
    expected = []
    for s, t in intervals():
        h = t - s
        expected += [((0, 1), ((1 / s, -1 / s), to_midpoint(s)))]
        expected += [((0, 1, 2, 3), ((1.0, on(c_by_rm=h / 2), on(c_by_rm=-h / 2), on(c=h, c_by_r=-h / 2)),))]
    check(written(make_solver("dpm", **options)), expected)


FIRST_ORDER = [
    make_solver("euler"),
    make_solver("ipndm", max_order=1),
    make_solver("deis", max_order=1),
    make_solver("dpmpp", max_order=1, predict_x0=False),
]


@pytest.mark.parametrize("solver", FIRST_ORDER)
def test_euler_is_written_as_its_formula(solver):
    """x' = x + c (t - m) (x - D) / m."""
    expected = []
    for s, t in intervals():
        expected += [((0, 1), (to_midpoint(s),)), ((0, 1), ((on(one=1, c=-1, c_by_m=t), on(c=1, c_by_m=-t)),))]
    check(written(solver), expected)


def test_first_order_data_prediction_is_written_as_its_formula():
    """y = m/s x + (1 - m/s) D, x' = t/m y + c (1 - t/m) D'."""
    expected = []
    for s, t in intervals():
        expected += [((0, 1), ((on(m=1 / s), on(one=1, m=-1 / s)),))]
        expected += [((0, 1), ((on(by_m=t), on(c=1, c_by_m=-t)),))]
    check(written(make_solver("dpmpp", max_order=1, thresholding=False)), expected)


def test_ipndm_is_written_as_its_formula():
    """x' = x + h (3/2 d - 1/2 d_old): h = m - s, with the d_old of the last interval, then h = c (t - m)."""
    expected = []
    for i, (s, t) in enumerate(intervals()):
        first = [(1 / s, -1 / s), to_midpoint(s)]
        if i:
            first = [(1 / s, -1 / s, 0.0), (on(one=-0.5, m=1.5 / s), on(one=1.5, m=-1.5 / s), on(one=0.5 * s, m=-0.5))]
        x = on(one=1, c=-1.5, c_by_m=1.5 * t)
        second = [(on(by_m=1), on(by_m=-1), 0.0), (x, on(c=1.5, c_by_m=-1.5 * t), on(c=-0.5 * t, cm=0.5))]
        columns = (0, 1, 2) if i else (0, 1)
        expected += [(columns, tuple(first)), ((0, 1, 2), tuple(second))]
    check(written(make_solver("ipndm", max_order=2)), expected)


# ---- what has no such weights


@dataclass(frozen=True)
class Remembering(IPNDM):
    """Steps from the level before the last, which on a second interval is the first one's midpoint."""

    max_order: int = 2

    def row(self, sigmas, sigma_next, k, n):
        return Row(1.0, (sigma_next - sigmas[:2][-1],))


@dataclass(frozen=True)
class Scaled(AMED):
    """AMED-Solver whose last coefficient is something else: `take` of a midpoint, with its level in place of scale_time."""

    take: object = None

    def step(self, past, sigma, sigma_next, midpoint, i, n):
        first, _ = super().step(past, sigma, sigma_next, midpoint, i, n)
        row = Row(1.0, (self.take(midpoint._replace(scale_time=first.sigma[0])),))
        return [first, Stage((row,), x_is_y=True)]


@pytest.mark.parametrize("name", ["deis", "dpmpp", "unipc"])
@pytest.mark.parametrize("intervals", [1, 3])
def test_solvers_of_logarithms_are_refused(name, intervals):
    with pytest.raises(ConfigError, match="use amed, dpm, euler or ipndm, or pass freeze=True"):
        written(make_solver(name), make_schedule("polynomial", intervals + 1, 0.002, 80.0))


def test_midpoints_of_other_intervals_are_refused():
    assert len(written(Remembering(), SIGMAS[:2])) == 2
    with pytest.raises(
        ConfigError, match="the coefficients of Remembering under a predictor are no combination of 1, m,"
    ):
        written(Remembering())


REFUSED = {
    "r": lambda said: said.r,
    "c·c": lambda said: said.scale_dir * said.scale_dir,
    "c·c/r": lambda said: said.scale_dir * said.scale_dir / said.r,
    "m·m·m": lambda said: said.scale_time * said.scale_time * said.scale_time,
    "1/(1 + c)": lambda said: 1 / (1 + said.scale_dir),
    "log m": lambda said: said.scale_time.log(),
    "sqrt c": lambda said: said.scale_dir**0.5,
    "expm1 c": lambda said: torch.expm1(said.scale_dir),
}


@pytest.mark.parametrize("name", REFUSED)
def test_functions_outside_the_eight_are_refused(name):
    with pytest.raises(ConfigError, match="the coefficients of Scaled under a predictor are no combination of 1, m,"):
        written(Scaled(take=REFUSED[name]))


def test_detours_through_other_functions_are_not_refused():
    """c·c·m / c."""
    last = written(Scaled(take=lambda said: 0.5 * said.scale_dir * said.scale_dir * said.scale_time / said.scale_dir))[
        -1
    ]
    assert last.coefficients[0][1:] == (on(c=0.5), on(c=-0.5))


def test_parallel_points_are_not_what_this_predictor_says():
    with pytest.raises(ConfigError, match="amed with points=2 needs 2 leading entries"):
        written(make_solver("amed", points=2))


# ---- the arithmetic

# With r an integer, sigma^r is rational, and so every result exact.
Known = tuple[Expression, Fraction]


def known(r: int, c: Fraction) -> st.SearchStrategy[Known]:
    """Expressions, each with its value."""
    symbols = {"r": Fraction(r), "c": c}
    s, t = Fraction(3), Fraction(1, 2)
    r_, c_ = (Expression.symbol(name) for name in symbols)
    leaves = [(r_, symbols["r"]), (c_, c), (t**r_ * s ** (1 - r_), t**r * s ** (1 - r)), (1 / r_, 1 / symbols["r"])]
    numbers = st.integers(-8, 8).map(lambda n: Fraction(n, 4))
    operands = st.one_of(numbers.map(lambda n: (n, n)), numbers.map(lambda n: (float(n), n)))
    operators = st.sampled_from([add, sub, mul, truediv])

    def combined(parts):
        operator, (a, x), (b, y) = parts
        if operator is truediv and len(Expression.of(b).terms) != 1:
            with pytest.raises(NoExpression, match="a quotient by"):
                a / b
            return a, x
        return operator(a, b), operator(x, y)

    def extend(inner):
        pairs = st.one_of(st.tuples(inner, inner), st.tuples(inner, operands), st.tuples(operands, inner))
        results = st.tuples(operators, pairs).map(lambda parts: combined((parts[0], *parts[1])))
        return st.one_of(results, inner.map(lambda pair: (-pair[0], -pair[1])))

    return st.recursive(st.sampled_from(leaves), extend, max_leaves=8)


def value(expression: Expression, symbols: dict) -> Fraction:
    total = Fraction(0)
    for powers, weight in expression.terms:
        for name, k in powers:
            base = symbols[name] if isinstance(name, str) else Fraction(name[0]) ** int(value(name[1], symbols))
            weight *= base**k
        total += weight
    return total


@given(st.data())
def test_expressions_are_the_numbers_they_stand_for(data):
    r = data.draw(st.sampled_from([-2, -1, 1, 2, 3]))
    c = data.draw(st.sampled_from([Fraction(-1, 3), Fraction(2), Fraction(7, 5)]))
    expression, expected = data.draw(known(r, c))
    assert value(expression, {"r": Fraction(r), "c": c}) == expected
    assert all(weight and all(k for _, k in powers) for powers, weight in expression.terms)


def test_an_expression_is_a_number_or_weights_over_a_basis():
    one, c = Expression.of(1), Expression.symbol("c")
    assert ((c + 1) * 0.125 - c / 8).over((one,)) == 0.125
    assert (c - c).over((one, c)) == 0.0
    assert (c / 3 + 1).over((one, c, 1 / c)) == (1.0, 1 / 3, 0.0)
    with pytest.raises(NoExpression, match="outside the span"):
        (c + 1).over((one, 1 / c))


def test_midpoints_are_told_apart_by_their_levels():
    r = Expression.symbol("r")
    assert 0.5**r * 3.0 ** (1 - r) == Fraction(1, 2) ** r * Fraction(3) ** (1 - r)
    assert 0.5**r * 3.0 ** (1 - r) != 0.25**r * 0.5 ** (1 - r)
