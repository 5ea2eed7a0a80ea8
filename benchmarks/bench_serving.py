"""Many requests of unlike evaluations at once: what the engine and its server make of them, beside what there is without.

    python benchmarks/bench_serving.py --out benchmarks/results/serving-cpu.json --baseline PATH

Parts: `saturation`, all requests at once, by ContinuousSampler and three ways of Sampler.run; `latency` at a part of that
rate, of short requests beside long ones and alone; `servers`, `amed serve` beside LitServe's servers as of commit b88507b,
over loopback; `overhead`, what of a tick is not the network. Contestants run in turns; every round is kept. What a part needs
of an earlier one may stand in the file already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import environment
from serving_engines import GROUPED, SINGLE, TICKS, Bench, latency, overhead, saturation
from serving_servers import AMED, LITSERVE, servers
from targets import Target, judged_ticks

PARTS = ("saturation", "latency", "servers", "overhead")
SIZES = (1, 4, 8, 16, 64)  # rows whose tick is timed


def run(part: str, options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """What a part found, and where."""
    data = {"environment": environment(torch.device(options.device)), "load": options.load}
    if part == "servers":
        return data | servers(options.baseline, options.rows, options.load, options.requests, options.rounds)
    if part == "overhead":
        device = torch.device(options.device)
        sizes = [overhead(options.workload, rows, device, options.rounds) for rows in SIZES]
        return data | {"workload": options.workload, "sizes": sizes}
    with (bench := Bench(options.rows, options.batch)).engine:
        if part == "saturation":
            return data | saturation(bench, options.rounds)
        rate = options.load * found["saturation"]["requests_per_second"]
        return data | latency(bench, rate, options.requests, options.rounds)


def judged(found: dict[str, Any]) -> Iterator[Target]:
    """Every target for which there are numbers."""
    if rows := found.get("saturation", {}).get("contestants"):
        yield Target(f"{TICKS}: times the throughput of {SINGLE}", rows[SINGLE]["ticks_are_times_faster"], 5.0, True)
        yield Target(f"{TICKS}: of the throughput of {GROUPED}", rows[GROUPED]["ticks_are_times_faster"], 0.95, True)
    if "latency" in found:
        yield Target("p95 of NFE 3 beside longer requests, over that alone", found["latency"]["p95_of_3_ratio"], 1.3)
    if "servers" in found:
        yield from _p99(found["servers"])
    if "overhead" in found:
        measured = found["overhead"]
        yield from judged_ticks(measured["sizes"], on_gpu=bool(measured["environment"]["gpu"]))


def _p99(found: dict[str, Any]) -> Iterator[Target]:
    for name in (name for name in found if name.endswith((AMED, LITSERVE))):
        ours, theirs = (found[name][server]["median_latency"]["p99"] for server in (AMED, LITSERVE))
        yield Target(f"p99 of all over that of {LITSERVE}, at {name}", ours / theirs, 0.5)


def table_of(part: str, found: dict[str, Any]) -> str:
    """For people and docs/results.md."""
    made = {
        "saturation": _saturation_table,
        "latency": _latency_table,
        "servers": _servers_table,
        "overhead": sizes_table,
    }
    return "\n".join(made[part](found[part]))


def tables(found: dict[str, Any]) -> str:
    parts = [table_of(part, found) + "\n" for part in PARTS if part in found]
    return "\n".join([*parts, *(target.describe() for target in judged(found))])


def _saturation_table(found: dict[str, Any]) -> Iterator[str]:
    yield f"| {found['requests']} requests at once | seconds | samples/s | `ContinuousSampler` is times faster |"
    yield "|---|---|---|---|"
    for name, row in found["contestants"].items():
        if "skipped" in row:
            yield f"| {name} | {row['skipped']} | | |"
        else:
            rate = found["requests"] / row["seconds"]
            yield f"| {name} | {row['seconds']:.3g} | {rate:.3g} | {row['ticks_are_times_faster']:.3g} |"


def _latency_table(found: dict[str, Any]) -> Iterator[str]:
    yield f"| at {found['load']:.0%} of saturation, ms | requests | p50 | p95 | p99 |"
    yield "|---|---|---|---|---|"
    for name in ("mixed", "alone"):
        for group, each in found[name].items():
            if isinstance(each, dict):
                yield f"| {name}, {group} | {each['count']} | {_ms(each)} |"


def _servers_table(found: dict[str, Any]) -> Iterator[str]:
    yield "| load | server | samples/s | failed | p50, ms | p95 | p99 |"
    yield "|---|---|---|---|---|---|---|"
    for load, reports in found.items():
        if load == "saturation" or " of " in load:
            for name, each in reports.items():
                rate = each["median_samples_per_second"]
                yield f"| {load} | {name} | {rate:.3g} | {each['failed']} | {_ms(each['median_latency'])} |"


def sizes_table(found: dict[str, Any]) -> Iterator[str]:
    yield "| rows | tick, ms | network alone, ms | tick over it | with admission and delivery | outside the network, ms |"
    yield "|---|---|---|---|---|---|"
    for each in found["sizes"]:
        over = " | ".join(f"{statistics.median(each[key]):.3f}" for key in ("tick_over_network", "whole_over_network"))
        outside = "" if each["outside_ms"] is None else f"{each['outside_ms']:.2g}"
        yield f"| {each['rows']} | {each['tick_ms']:.3g} | {each['network_ms']:.3g} | {over} | {outside} |"


def _ms(each: dict[str, float]) -> str:
    return " | ".join(f"{1e3 * each[q]:.3g}" for q in ("p50", "p95", "p99"))


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the servers
    found = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for part in options.parts:
        found[part] = run(part, options, found)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(
                json.dumps(found | {"targets": [t.to_json() for t in judged(found)]}, indent=1) + "\n"
            )
    print(tables(found))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write; what is there of other parts stays")
    parser.add_argument("--parts", default=",".join(PARTS), help="by commas")
    parser.add_argument("--baseline", type=Path, help="a checkout of commit b88507b with a .venv, for the part servers")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=96, help="requests that are there at once, of saturation")
    parser.add_argument("--requests", type=int, default=300, help="that arrive one by one, in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--load", type=float, default=0.7, help="part of the rate at saturation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workload", default="digits", help="network of the part overhead")
    parser.add_argument("--device", default="cpu", help="of the part overhead")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if "servers" in options.parts and not options.baseline:
        parser.error("the part servers needs --baseline, or leave it out of --parts")
    return options


if __name__ == "__main__":
    sys.exit(main())
