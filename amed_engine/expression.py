"""Coefficients as solvers write them down, exactly, with symbols for what a predictor has yet to say."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from numbers import Rational
from typing import Any


@dataclass(frozen=True)
class Expression:
    """Σ weight · Π symbol^k: a set of (Π, weight), each Π a set of (symbol, k); rational weights, integers k, none zero.

    Other operands may be numbers and float64 scalar tensors; sigma^r, of a number sigma, is a symbol too. What is no such sum
    (logarithms, quotients by sums) raises TypeError or AttributeError.
    """

    terms: frozenset[tuple[frozenset[tuple[Hashable, int]], Fraction]]

    @classmethod
    def symbol(cls, name: Hashable) -> Any:  # goes where solvers take tensors
        return cls(frozenset({(frozenset({(name, 1)}), Fraction(1))}))

    @classmethod
    def of(cls, value: Any) -> Expression:
        if isinstance(value, cls):
            return value
        return cls(_total([(frozenset(), Fraction(value if isinstance(value, Rational) else float(value)))]))

    def over(self, basis: Sequence[Expression]) -> float | tuple[float, ...]:
        """Its weight on every Π of the basis, rounded once; alone if only the first is not zero. TypeError outside its span."""
        terms = dict(self.terms)
        weights = tuple(float(terms.pop(powers, 0)) for function in basis for powers, _ in function.terms)
        if terms:
            raise TypeError(f"outside the span of the basis: {terms}")
        return weights if any(weights[1:]) else weights[0]

    def __add__(self, other: Any) -> Expression:
        return Expression(_total([*self.terms, *Expression.of(other).terms]))

    def __mul__(self, other: Any) -> Expression:
        pairs = product(self.terms, Expression.of(other).terms)
        return Expression(_total((_total([*p, *q]), v * w) for (p, v), (q, w) in pairs))

    def __truediv__(self, other: Any) -> Expression:
        terms = Expression.of(other).terms
        if len(terms) != 1:
            raise TypeError(f"a quotient by {len(terms)} terms")
        return self * Expression(frozenset((frozenset((name, -k) for name, k in p), 1 / w) for p, w in terms))

    def __rpow__(self, base: float) -> Expression:
        return Expression.symbol((base, self))

    def __neg__(self) -> Expression:
        return self * -1

    def __sub__(self, other: Any) -> Expression:
        return self + other * -1

    def __rsub__(self, other: Any) -> Expression:
        return -self + other

    def __rtruediv__(self, other: Any) -> Expression:
        return Expression.of(other) / self

    __radd__, __rmul__ = __add__, __mul__


def _total(pairs: Iterable[tuple[Any, Any]]) -> frozenset:
    """Each key once, with the sum of its values, where that is not zero."""
    total: dict = {}
    for key, value in pairs:
        total[key] = total.get(key, 0) + value
    return frozenset((key, value) for key, value in total.items() if value)
