"""What a sweep of real_networks.py says: which rule is nearest to the best of every network, and what a stranger would get.

A rule is (first step, solver, schedule). Its cost on a network is its error over that of the best combination measured there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from amed_engine.solvers.plan import best_training_free

# Five of galaxies up to 64² that the package offers by name, and the bundled one.
YARDSTICK = ("hsc32", "hsc64", "ztf32", "ztf64", "lsst60", "digits")
# Reported beside them, in tables of their own: the bundled one under guidance, and one that predicts a velocity.
BESIDE = ("digits-g1.5", "digits-g3", "flow-digits")
FIRSTS = ("mean", "plain", "zero")
MEASURES = {"rmse": 0, "median": 1}
Rule = tuple[str, str, str]
Costs = dict[Rule, dict[str, float]]


def defaults(nfe: int) -> tuple[Rule, ...]:
    """What a Sampler does that is asked for the NFE alone, with a measured mean and without; and what it did once."""
    plans = {"mean": best_training_free(nfe, afs="mean"), "plain": best_training_free(nfe, afs=False)}
    own = ((first, f"{plan.solver}-{dict(plan.options)['max_order']}", plan.schedule) for first, plan in plans.items())
    return *own, ("zero", "ipndm-2" if nfe <= 6 else "ipndm-3", "time_uniform")


def errors(network: dict[str, Any], nfe: int, by: str) -> dict[Rule, float]:
    """Every combination that was measured at this NFE."""
    schedules = network["sweep"].get(str(nfe), {})
    return {
        (first, solver, schedule): found[MEASURES[by]]
        for schedule, firsts in schedules.items()
        for first, solvers in firsts.items()
        for solver, found in solvers.items()
    }


def costs(networks: dict[str, Any], nfe: int, by: str) -> Costs:
    """Rule -> network -> its cost, of the rules that every network was measured with."""
    found = {name: errors(network, nfe, by) for name, network in networks.items()}
    best = {name: min(rules.values()) for name, rules in found.items()}
    common = set.intersection(*(set(rules) for rules in found.values()))
    return {rule: {name: found[name][rule] / best[name] for name in found} for rule in sorted(common)}


def score(cost: dict[str, float], without: str | None = None) -> tuple[float, float]:
    """Geometric mean and worst over the networks."""
    values = [value for name, value in cost.items() if name != without]
    return statistics.geometric_mean(values), max(values)


def combined(cost: dict[str, float], without: str | None = None) -> float:
    """What rules are chosen by: both count, the mean of all networks and the worst one, log-equally."""
    return math.prod(score(cost, without))


def ranked(found: Costs, first: str) -> list[Rule]:
    return sorted((rule for rule in found if rule[0] == first), key=lambda rule: combined(found[rule]))


def left_out(found: Costs, first: str) -> dict[str, tuple[Rule, float]]:
    """Network -> the rule that the others choose, and what it costs there."""
    rules, names = ranked(found, first), next(iter(found.values()))
    chosen = {name: min(rules, key=lambda rule: combined(found[rule], name)) for name in names}
    return {name: (rule, found[rule][name]) for name, rule in chosen.items()}


def report(networks: dict[str, Any], names: Sequence[str], nfes: Sequence[int], by: str, rows: int) -> str:
    """All tables as text: of YARDSTICK, and beside it of BESIDE, unless names are given."""
    parts = []
    for nfe in nfes:
        for group in (names,) if names else (YARDSTICK, BESIDE):
            there = {name: networks[name] for name in group if name in networks and errors(networks[name], nfe, by)}
            if there:
                parts.append("\n".join(_section(there, nfe, by, rows)))
    return "\n\n".join(parts) or "nothing is measured of these networks at these NFE"


def _section(networks: dict[str, Any], nfe: int, by: str, rows: int) -> Iterator[str]:
    found = costs(networks, nfe, by)
    yield f"NFE {nfe}, {by}" + " " * 36 + "".join(f"{name:>12}" for name in networks)
    for first in FIRSTS:
        yield _line(f"best with first step {first}", [_least(network, nfe, by, first) for network in networks.values()])
    fits = [network["fit"].get(str(nfe)) for network in networks.values()]
    if any(fits):
        yield _line("fit", [fit["error"][MEASURES[by]] if fit else math.nan for fit in fits])
    yield f"{'times the best of all':<37}{'mean':>6}{'worst':>6}"
    for first in FIRSTS[:2]:
        yield from (_cost(rule, found) for rule in ranked(found, first)[:rows])
        if len(networks) > 1:
            yield _stranger(first, left_out(found, first))
    yield from (_cost(rule, found) for rule in defaults(nfe) if rule in found)


def _least(network: dict[str, Any], nfe: int, by: str, first: str) -> float:
    return min(error for rule, error in errors(network, nfe, by).items() if rule[0] == first)


def _line(title: str, values: Sequence[float]) -> str:
    return f"{title:<49}" + "".join(f"{value:12.4f}" for value in values)


def _cost(rule: Rule, found: Costs) -> str:
    mean, worst = score(found[rule])
    return f"  {' '.join(rule):<35}{mean:6.2f}{worst:6.2f}" + "".join(f"{cost:12.2f}" for cost in found[rule].values())


def _stranger(first: str, chosen: dict[str, tuple[Rule, float]]) -> str:
    mean, worst = score({name: cost for name, (_, cost) in chosen.items()})
    rules = "; ".join(f"{name} {' '.join(rule[1:])}" for name, (rule, _) in chosen.items())
    values = "".join(f"{cost:12.2f}" for _, cost in chosen.values())
    return f"  {f'{first}, each left out once':<35}{mean:6.2f}{worst:6.2f}{values}\n    {rules}"
