"""Half an hour of everything a server meets: mixed requests, clients that leave or are killed, bodies that make no sense.

    python benchmarks/soak_serving.py --out soak.json

`amed serve` runs in a process of its own. Every answer is compared with `Sampler.run`; what is not answered in time, wrong, not
refused as it should be, or left in the rows at the end is a finding, and so is memory that grows. At the end requests are
under way when the server gets SIGTERM: they are answered, and it ends with status 0. Findings make this end with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from harness import environment
from routes_servers import await_health, free_port
from soak_clients import Clients, Truth

from amed_engine.serving.load import Load, Mix, Outcome, offer

EVERY = 5.0  # seconds between looks at the memory
END = 60.0  # seconds for the rows to empty, and for the server to end


def resident(pid: int) -> float:
    """Of a process and its children, in MiB."""
    found = [pid]
    for each in found:
        found.extend(map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split()))
    lines = [line for each in found for line in Path(f"/proc/{each}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def soak(url: str, server: subprocess.Popen, options: argparse.Namespace) -> dict[str, Any]:
    """The load, and what is left when it is over."""
    load = Load(round(options.rate * options.minutes * 60), Mix({1: 1}), rate=options.rate, seed=options.seed)
    memory: list[tuple[float, float]] = []
    truth = Truth(options.model)
    async with Clients(url, truth, options.seed) as clients:
        await clients.crowd()
        watch = asyncio.create_task(_watch(server.pid, memory))
        outcomes = await offer(load.arrivals(), clients.ask, timeout=options.timeout)
        watch.cancel()
        left = await _left(clients)
        drained = await _drained(clients, server)
    return {
        "kinds": dict(clients.asked),
        "seconds": max(each.done for each in outcomes) - outcomes[0].due,
        "outcomes": dict(Counter(each.kind for each in outcomes)),
        "late": max(each.sent - each.due for each in outcomes),
        "memory_mib": memory,
        "growth": growth([mib for _, mib in memory]),
        "left": left,
        **drained,
        "findings": findings(outcomes, left, drained, memory, options.growth),
    }


async def _watch(pid: int, memory: list[tuple[float, float]]) -> None:
    start = time.monotonic()
    while True:
        memory.append((time.monotonic() - start, resident(pid)))
        await asyncio.sleep(EVERY)


async def _left(clients: Clients) -> dict[str, float]:
    """Rows and waiting samples once nobody asks any more."""
    end = time.monotonic() + END
    while any((left := await clients.gauges()).values()) and time.monotonic() < end:
        await asyncio.sleep(0.2)
    return left


async def _drained(clients: Clients, server: subprocess.Popen) -> dict[str, Any]:
    """Requests that are under way when the server is told to end."""
    asked = [asyncio.create_task(clients.drawn(number)) for number in range(16)]
    await asyncio.sleep(0.05)  # they are sent
    server.send_signal(signal.SIGTERM)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    try:
        status = await asyncio.to_thread(server.wait, END)
    except subprocess.TimeoutExpired:
        status = None
    return {"drained": [str(each) for each in answers if isinstance(each, BaseException)], "status": status}


def growth(mib: Sequence[float]) -> float:
    """From the median of the second quarter, when all is warm, to that of the last, in MiB; 0 of fewer than eight looks."""
    quarter = len(mib) // 4
    return statistics.median(mib[-quarter:]) - statistics.median(mib[quarter : 2 * quarter]) if quarter > 1 else 0.0


def findings(
    outcomes: Sequence[Outcome],
    left: dict[str, float],
    drained: dict[str, Any],
    memory: Sequence[tuple[float, float]],
    limit: float,
) -> list[str]:
    """What is not as it should be, each once with how often."""
    counted = Counter(each.reason for each in outcomes if each.kind != "answered")
    found = [f"{count} times: {reason}" for reason, count in counted.items()]
    found += [f"{name} is {value:g} after the last request" for name, value in left.items() if value]
    found += [f"while it drained: {reason}" for reason in drained["drained"]]
    if drained["status"] != 0:
        found.append(f"the server ended with status {drained['status']} after SIGTERM (None: not at all)")
    if (grown := growth([mib for _, mib in memory])) > limit:
        found.append(f"memory grew by {grown:.1f} MiB")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(1)
    port = free_port()
    command = [sys.executable, "-P", "-m", "amed_engine", "serve", "--model", options.model, "--port", str(port)]
    command += ["--device", options.device]
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd="/", env=own)
        stack.callback(_end, server)
        url = f"http://127.0.0.1:{port}"
        await_health(f"{url}/readyz", server)
        found = {"environment": environment(), "rate": options.rate, "minutes": options.minutes, "seed": options.seed}
        found |= asyncio.run(soak(url, server, options))
        log.seek(0)
        found["log"] = log.read().decode(errors="replace").splitlines()[-50:]
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    told = ("kinds", "seconds", "outcomes", "growth", "left", "drained", "status", "findings")
    print(json.dumps({name: found[name] for name in told}, indent=1))
    return 1 if found["findings"] else 0


def _end(server: subprocess.Popen) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=15.0, help="requests a second, of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds after which a request counts as hanging")
    parser.add_argument("--growth", type=float, default=16.0, help="MiB of memory that may be gained meanwhile")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
