"""Servers of the bundled digits in processes of their own: `amed serve`, and one of LitServe for each number of evaluations."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routes_servers import await_health, free_port
from serving_engines import MIXED, MODEL

from amed_engine.errors import AmedError, require
from amed_engine.serving.load import Arrival, Load, LoadReport, ServerTarget, measure

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
AMED, LITSERVE = "amed serve", "LitServe, a server for each NFE"


class LitServeTarget:
    """A request goes to the server of its number of evaluations, whose ports these are."""

    name = LITSERVE

    def __init__(self, ports: dict[int, int]):
        self.ports = ports

    async def __aenter__(self) -> LitServeTarget:
        self._http = require("httpx2", "serve", "asking a server")
        limits = self._http.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = self._http.AsyncClient(limits=limits, timeout=None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, arrival: Arrival) -> None:
        url = f"http://127.0.0.1:{self.ports[arrival.nfe]}/predict"
        try:
            response = await self._client.post(url, json={"seeds": list(arrival.seeds)})
        except self._http.HTTPError as error:
            raise AmedError(str(error) or type(error).__name__) from error
        if response.status_code != 200:
            raise AmedError(f"status {response.status_code}: {response.text[:200]}")
        if (drawn := len(response.json()["images"])) != len(arrival.seeds):
            raise AmedError(f"{drawn} samples in the answer, {len(arrival.seeds)} were asked for")

    async def rows(self) -> None:
        return None


@dataclass
class Arrangement:
    """Processes that serve together on one core. They are stopped while they are not asked: some poll when idle."""

    name: str
    target: Callable[[], AbstractAsyncContextManager[Any]]
    processes: list[subprocess.Popen]

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.killpg(process.pid, number)

    def report(self, load: Load) -> LoadReport:
        async def run() -> LoadReport:
            async with self.target() as target:
                return await measure(load, target)

        with self.awake():
            return asyncio.run(run())


def started(stack: ExitStack, command: Sequence[str], health: str, core: int | None) -> subprocess.Popen:
    """A server in a session of its own, one thread of torch, on a core; killed with the stack."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    pinned = None if core is None else lambda: os.sched_setaffinity(0, {core})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(command), start_new_session=True, cwd="/", env=environment, preexec_fn=pinned, **quiet
    )
    stack.callback(lambda: (os.killpg(process.pid, signal.SIGKILL), process.wait()))
    await_health(health, process)
    return process


def amed(stack: ExitStack, core: int | None, rows: int) -> Arrangement:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-P", "-m", "amed_engine", "serve", "--model", MODEL, "--port", str(port)]
    command += ["--rows", str(rows), "--device", "cpu"]
    return Arrangement(AMED, lambda: ServerTarget(url), [started(stack, command, f"{url}/readyz", core)])


def litserve(stack: ExitStack, core: int | None, python: Path) -> Arrangement:
    """As its page starts it: a server draws at one number of evaluations, so there is one for each. python: of the checkout."""
    module, ports, processes = "amed_engine.integrations.serving.litserve", {}, []
    for nfe in MIXED.weights:
        ports[nfe] = free_port()
        command = [str(python), "-P", "-m", module, "--model", MODEL, "--nfe", str(nfe), "--port", str(ports[nfe])]
        processes.append(started(stack, command, f"http://127.0.0.1:{ports[nfe]}/health", core))
    return Arrangement(LITSERVE, lambda: LitServeTarget(ports), processes)


def servers(baseline: Path, rows: int, load: float, requests: int, rounds: int) -> dict[str, Any]:
    """Both arrangements in turns on one core, asked from another: all requests at once, then the same arrivals at `load` of
    what each of them reached. baseline: a checkout with a `.venv` of its own."""
    core, own = (CORES[0], CORES[-1]) if len(CORES) > 1 else (None, None)
    with ExitStack() as stack:
        arrangements = [amed(stack, core, rows), litserve(stack, core, baseline / ".venv" / "bin" / "python")]
        for each in arrangements:
            each.signal(signal.SIGSTOP)
        if own is not None:
            before = os.sched_getaffinity(0)
            stack.callback(os.sched_setaffinity, 0, before)
            os.sched_setaffinity(0, {own})
        found: dict[str, Any] = {"cores": {"servers": core, "load": own}, "rows": rows}
        found["saturation"] = _in_turns(arrangements, lambda seed: Load(requests, MIXED, seed=seed), rounds)
        rates = {name: each["median_samples_per_second"] for name, each in found["saturation"].items()}
        for name, rate in rates.items():
            pace = load * rate
            found[f"{load:.0%} of {name}"] = _in_turns(
                arrangements, lambda seed, pace=pace: Load(requests, MIXED, rate=pace, seed=seed), rounds
            )
    return found


def _in_turns(arrangements: list[Arrangement], load: Callable[[int], Load], rounds: int) -> dict[str, dict[str, Any]]:
    """Each arrangement's reports by round, and the medians of their throughput and percentiles."""
    reports: dict[str, list[LoadReport]] = {each.name: [] for each in arrangements}
    for number in range(rounds):
        for each in arrangements[:: 1 if number % 2 else -1]:
            reports[each.name].append(each.report(load(number)))
    return {name: _told(own) for name, own in reports.items()}


def _told(reports: list[LoadReport]) -> dict[str, Any]:
    answered = [each.latency for each in reports if each.latency]
    medians = {q: statistics.median(getattr(each, q) for each in answered) for q in ("p50", "p95", "p99")}
    return {
        "median_samples_per_second": statistics.median(each.samples_per_second for each in reports),
        "median_latency": medians,
        "failed": sum(each.failed for each in reports),
        "refused": sum(each.refused for each in reports),
        "rounds": [each.to_json() for each in reports],
    }
