"""The same latents through every embedding route and through `Sampler.run`: difference, lines of code, time beside it.

    python benchmarks/bench_integrations.py --out benchmarks/results/integrations-cpu.json

Prints the table and writes it with where it was measured. A route whose library is missing is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from harness import Contestant, compete, environment
from routes import Bench, Route, as_pictures
from routes_files import FILES
from routes_samplers import SAMPLERS
from routes_servers import SERVERS

ROUTES = (*FILES, *SAMPLERS, *SERVERS)
CPU = torch.device("cpu")


def measure_group(bench: Bench, group: str, routes: list[Route], rounds: int) -> list[dict[str, Any]]:
    """`Sampler.run` and the routes that draw what it draws, in turns; one row per route."""
    engine = getattr(bench, group)
    with ExitStack() as stack:
        contestants = [Contestant("Sampler.run", engine)]
        contestants += [_contestant(route, bench, stack) for route in routes]
        measured = compete(contestants, CPU, rounds=rounds)
    return [_row(route, measured["Sampler.run"], measured[route.name]) for route in routes]


def _contestant(route: Route, bench: Bench, stack: ExitStack) -> Contestant:
    def pictures() -> torch.Tensor:
        return as_pictures(getattr(bench, route.group)()())

    expected = pictures if route.pictures else None
    return Contestant(route.name, lambda: route.setup(bench, stack), tolerance=route.tolerance, expected=expected)


def _row(route: Route, engine: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    facts = {"route": route.name, "docs": route.docs, "needs": route.needs, "lines": route.lines, "group": route.group}
    if "skipped" in measured:
        return facts | {"skipped": measured["skipped"]}
    kept = {key: measured[key] for key in ("difference", "setup_s", "rounds", "wall_ms")}
    return facts | kept | {"sampler_run_ms": engine["wall_ms"], "tolerance": route.tolerance}


def table(rows: list[dict[str, Any]]) -> str:
    """For docs/results.md."""
    head = "| route | needs | lines of code | largest difference | latency, ms | `Sampler.run` beside it, ms |"
    return "\n".join([head, "|---|---|---|---|---|---|", *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    start = f"| [{row['route']}]({row['docs']}) | {row['needs']} | {row['lines']} |"
    if "skipped" in row:
        return f"{start} not measured: {row['skipped']} | | |"
    apart = f"{row['difference']:.0e}" if row["difference"] else "0, bitwise"
    return f"{start} {apart} | {row['wall_ms']['median']:.3g} | {row['sampler_run_ms']['median']:.3g} |"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the servers
    wanted = tuple(options.routes.lower().split(","))
    chosen = [route for route in ROUTES if route.name.lower().startswith(wanted)]
    bench, found = Bench(options.model, options.batch), {}
    for group in dict.fromkeys(route.group for route in chosen):
        members = [route for route in chosen if route.group == group]
        found |= {row["route"]: row for row in measure_group(bench, group, members, options.rounds)}
    rows = [found[route.name] for route in chosen]
    data = {"environment": environment(), "model": options.model, "batch": options.batch, "routes": rows}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(data, indent=1) + "\n")
    print(table(rows))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--routes", default="", help="how their names begin, by commas; all without it")
    parser.add_argument("--model", default="digits", help="a workload; the servers hold digits whatever this says")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other on a busy machine")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
