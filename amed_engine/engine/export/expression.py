"""Coefficients as solvers write them down, exactly, with symbols for what a predictor has yet to say."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction
from itertools import product
from numbers import Rational
from typing import Any, NoReturn


class NoExpression(TypeError):
    """A function, such as a logarithm, that no expression has."""


class Expression:
    """Σ weight · Π symbol^k: a set of (Π, weight), each Π a set of (symbol, k); rational weights, integers k, none zero.

    Other operands may be numbers; sigma^r, of a number sigma, is a symbol too. What is no such sum (logarithms, quotients by
    sums) raises NoExpression.
    """

    def __init__(self, terms: frozenset[tuple[frozenset[tuple[Hashable, int]], Fraction]]):
        self.terms = terms

    @classmethod
    def symbol(cls, name: Hashable) -> Any:  # goes where solvers take tensors
        return cls(frozenset({(frozenset({(name, 1)}), Fraction(1))}))

    @classmethod
    def of(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        return cls(_total([(frozenset(), Fraction(value if isinstance(value, Rational) else float(value)))]))

    @property
    def number(self) -> Fraction | None:
        """Its value, None where a symbol is in it."""
        weights = dict(self.terms)
        return weights.get(frozenset(), Fraction(0)) if set(weights) <= {frozenset()} else None

    def over(self, basis: Sequence[Expression]) -> float | tuple[float, ...]:
        """Its weight on every Π of the basis, rounded once; alone if only the first is not zero. NoExpression outside."""
        terms = dict(self.terms)
        weights = tuple(float(terms.pop(powers, 0)) for function in basis for powers, _ in function.terms)
        if terms:
            raise NoExpression(f"outside the span of the basis: {terms}")
        return weights if any(weights[1:]) else weights[0]

    def __eq__(self, other: object) -> bool:
        return self.terms == Expression.of(other).terms

    def __hash__(self) -> int:
        return hash(self.terms)

    def __add__(self, other: Any) -> Expression:
        return Expression(_total([*self.terms, *Expression.of(other).terms]))

    def __mul__(self, other: Any) -> Expression:
        pairs = product(self.terms, Expression.of(other).terms)
        return Expression(_total((_total([*p, *q]), v * w) for (p, v), (q, w) in pairs))

    def __truediv__(self, other: Any) -> Expression:
        terms = Expression.of(other).terms
        if len(terms) != 1:
            raise NoExpression(f"a quotient by {len(terms)} terms")
        return self * Expression(frozenset((frozenset((name, -k) for name, k in p), 1 / w) for p, w in terms))

    def __pow__(self, power: Any) -> Expression:
        if self.number is None or not isinstance(power, Expression):
            raise NoExpression(f"a power of {self.terms}")
        return Expression.symbol((self.number, power))

    def __rpow__(self, base: float) -> Expression:
        return Expression.of(base) ** self

    def __neg__(self) -> Expression:
        return self * -1

    def __sub__(self, other: Any) -> Expression:
        return self + other * -1

    def __rsub__(self, other: Any) -> Expression:
        return -self + other

    def __rtruediv__(self, other: Any) -> Expression:
        return Expression.of(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __getattr__(self, name: str) -> NoReturn:
        """Methods of tensors: log, exp, sqrt ..."""
        if name.startswith("__"):  # what Python and torch look for is absent as usual
            raise AttributeError(name)
        raise NoExpression(f"{name} of an expression")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise NoExpression(f"{function.__name__} of an expression")


def _total(pairs: Iterable[tuple[Any, Any]]) -> frozenset:
    """Each key once, with the sum of its values, where that is not zero."""
    total: dict = {}
    for key, value in pairs:
        total[key] = total.get(key, 0) + value
    return frozenset((key, value) for key, value in total.items() if value)
