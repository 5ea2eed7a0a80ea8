"""One call that shows what the engine does on a GPU: gpu tests, kernels, whole samples, ticks; one JSON and a table.

    python benchmarks/gpu_report.py --out DIR [--minutes 8.5] [--suites tests,kernels,samples,ticks] [--full]

Needs no network. What did not fit into the time is named in the JSON. --dry-run tries the plumbing on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # before torch, whose first import on a fresh machine can take most of a minute

import bench_kernels  # noqa: E402
import bench_sampler  # noqa: E402
import torch  # noqa: E402
from bench_serving import sizes_table as tables_of_ticks  # noqa: E402
from harness import ROOT, environment  # noqa: E402
from serving_engines import overhead  # noqa: E402
from targets import Target, judged, judged_ticks  # noqa: E402

RESULTS = Path(__file__).parent / "results"
FIRST = ("engine", "serving", ".")  # folders of tests, should time run out
SUITES = ("tests", "kernels", "samples", "ticks")
SHARE = {"tests": 0.35, "kernels": 0.4, "samples": 0.85, "ticks": 1.0}  # of the time left when its turn comes
GRACE = 10.0  # seconds that the last case may run over
STOPPED = "(stopped: out of time)"
COMPILING = 90.0  # what a case with compiled contestants takes at the very least


class OutOfTime(BaseException):
    """No Exception: nothing on the way may take it for the failure of a contestant."""


class Report:
    """What was found so far, written after every case: a run that is cut off leaves what it had."""

    def __init__(self, folders: list[Path], device: torch.device, suffix: str = ""):
        found = environment(device)
        gpu = re.sub(r"[^a-z0-9]+", "-", (found["gpu"] or "cpu").lower()).strip("-").removeprefix("nvidia-")
        name = f"gpu-{gpu}-{found['commit'][:8]}{suffix}.json"
        self.files = [folder / name for folder in folders]
        self.data: dict[str, Any] = {
            "environment": found,
            "left_out": [],
            "tests": None,
            "kernels": {},
            "samples": {},
            "ticks": {},
        }

    def write(self) -> None:
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.data, indent=1, default=str) + "\n")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_report: torch sees no CUDA device; run this on a GPU machine, or with --dry-run", file=sys.stderr)
        return 2
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    folders = [options.out] if options.dry_run else [RESULTS, options.out]
    report = Report([folder for folder in folders if folder], device, options.suffix)
    end = (STARTED if arguments is None else time.monotonic()) + 60 * options.minutes
    for suite in SUITES:
        if suite in options.suites.split(","):
            allowed = (end - time.monotonic()) * SHARE[suite]
            _run_suite(suite, report, device, time.monotonic() + allowed, options)
    report.data["targets"] = [target.to_json() for target in _targets(report.data)]
    report.write()
    print(table(report.data))
    print("\n".join(f"wrote {file}" for file in report.files))
    return 0


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what runs longer: no estimate of a compilation can be relied on."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a second folder for the JSON")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything")
    parser.add_argument("--suites", default=",".join(SUITES), help="which of tests, kernels, samples, ticks")
    parser.add_argument("--cases", default="", help="only cases whose name contains this, e.g. cifar10-64")
    parser.add_argument(
        "--full", action="store_true", help="also the loop compiled as a whole (minutes of compilation)"
    )
    parser.add_argument("--suffix", default="", help="added to the name of the JSON")
    parser.add_argument("--dry-run", "--cpu", action="store_true", dest="dry_run", help="on a CPU, with tiny sizes")
    return parser.parse_args(arguments)


def _run_suite(suite: str, report: Report, device: torch.device, end: float, options: argparse.Namespace) -> None:
    if suite == "tests":
        report.data["tests"] = _gpu_tests(max(end - time.monotonic(), 1), options.dry_run)
        report.write()
        return
    for name, needed, run in _cases(suite, device, options):
        left = end - time.monotonic()
        if options.cases not in name or left < (0 if options.dry_run else needed):
            why = "not asked for" if options.cases not in name else "no time left"
            report.data["left_out"].append({"suite": suite, "case": name, "reason": why})
            continue
        try:
            with _at_most(left + GRACE):
                report.data[suite][name] = _guarded(run, left)
        except OutOfTime:
            report.data["left_out"].append({"suite": suite, "case": name, "reason": "stopped, it took too long"})
        report.write()
        print(f"{name}: {end - time.monotonic():.0f} s left", flush=True)


def _cases(suite: str, device: torch.device, options: argparse.Namespace):
    """(name, seconds it needs at the least, run(time_left)) in order of importance."""
    tiny = options.dry_run
    settings: dict[str, Any] = {"rounds": 5, "budget": 1.0} if tiny else {"rounds": 15, "budget": 10.0}
    if suite == "kernels":
        for case in bench_kernels.cases(device, tiny=tiny):
            run = lambda left, case=case: bench_kernels.run(  # noqa: E731
                case, device, compiled=not tiny, time_left=left, **settings
            )
            yield bench_kernels.label(case), 5.0, run
        return
    if suite == "ticks":
        for name, rows in [("tiny", 2)] if tiny else [("cifar10", 64), ("cifar10", 8)]:
            run = lambda left, name=name, rows=rows: overhead(name, rows, device, settings["rounds"])  # noqa: E731
            yield f"{name}-{rows}", 20.0, run
        return
    trials = [("tiny", 2), ("tiny-labels", 2), ("tiny-latent", 2)]
    for case, compiled in [(case, False) for case in trials] if tiny else bench_sampler.plan(device):
        run = lambda left, case=case, compiled=compiled: bench_sampler.run(  # noqa: E731
            case, device, full=options.full, compiled=compiled, time_left=left, **settings
        )
        yield f"{case[0]}-{case[1]}", COMPILING if compiled else 5.0, run


def _guarded(run, left: float) -> dict[str, Any]:
    """A case that breaks, for lack of memory perhaps, is reported and does not stop the others."""
    try:
        return run(left)
    except Exception as error:
        return {"all": {"skipped": f"failed: {type(error).__name__}: {str(error)[:300]}"}}
    finally:
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _gpu_tests(seconds: float, dry_run: bool) -> dict[str, Any]:
    """pytest's verdict on the tests marked gpu, in a process of their own."""
    # -P: the checkout's own kernels/ would be found instead of packages of that name.
    command = [sys.executable, "-P", "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    # Several processes where pytest-xdist is there.
    command += [str(ROOT / "tests" / name) for name in FIRST]
    # A file that cannot be imported there, for lack of some library, must not keep the others from running.
    command.append("--continue-on-collection-errors")
    command += ["--collect-only"] if dry_run else ["-n", "6"] if find_spec("xdist") else []
    started = time.monotonic()
    output, code = _run(command, seconds)
    lines = output.strip().splitlines()
    # The summary's lines, and while they run those of single tests: a run that is cut off has no summary.
    notable = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED", "E  ")) or " FAILED" in line]
    verdicts = [
        line for line in lines if re.search(r"\d (passed|failed|errors?|skipped|deselected|tests collected)", line)
    ]
    return {
        "returncode": code,
        "seconds": time.monotonic() - started,
        "summary": " ".join(verdicts[-1:] + ([STOPPED] if code is None else [])),
        "passed": sum(" PASSED" in line or line.startswith("PASSED") for line in lines),
        "notable": notable[:200],
        "tail": [] if code == 0 else lines[-400:],
    }


def _run(command: list[str], seconds: float) -> tuple[str, int | None]:
    """What a command said, and its exit status; None where time was up, when it may still say what failed so far."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    # What a shell starts in the background ignores SIGINT, and so would all that it starts.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, **pipe, cwd=ROOT, start_new_session=True, preexec_fn=hears)
    try:
        return process.communicate(timeout=seconds)[0], process.returncode
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        said = process.communicate(timeout=GRACE)[0]
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout or ""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
    # The workers too: they would take the device from what is measured next.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return said, None


# ---- the table


def table(data: dict[str, Any]) -> str:
    """Markdown for the README: where, tests, samples, kernels, and what is missing."""
    found = data["environment"]
    parts = [
        f"{found['gpu'] or found['cpu']}, driver {found['driver']}, torch {found['torch']}, triton {found['triton']}, "
        f"commit {found['commit'][:8]}{' with changes' if found['dirty'] else ''}"
    ]
    if data["tests"]:
        parts.append(f"gpu tests: {data['tests']['summary']}")
    if data["samples"]:
        parts.append(_samples(data["samples"]))
    if data["kernels"]:
        parts.append(_kernels(data["kernels"]))
    if ticks := _measured(data):
        parts.append("\n".join(tables_of_ticks({"sizes": ticks})))
    if targets := _targets(data):
        parts.append("\n".join(f"- {target.describe()}" for target in targets))
    if data["left_out"]:
        parts.append("Left out: " + "; ".join(f"{item['case']} ({item['reason']})" for item in data["left_out"]))
    return "\n\n".join(parts)


def _targets(data: dict[str, Any]) -> list[Target]:
    on_gpu = bool(data["environment"]["gpu"])
    return [*judged(data["kernels"], data["samples"]), *judged_ticks(_measured(data), on_gpu=on_gpu)]


def _measured(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The sizes of ticks that did not break."""
    return [size for size in data["ticks"].values() if "rows" in size]


def _samples(cases: dict[str, dict[str, dict]]) -> str:
    lines = [
        "| samples | | ms wall | ms events | images/s | ms outside denoiser | overhead |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, rows in cases.items():
        for name, row in rows.items():
            lines.append(f"| {case} | {name} | {_sample_cells(row)} |")
    return "\n".join(lines)


def _sample_cells(row: dict) -> str:
    if "skipped" in row:
        return f"{row['skipped'][:90]} | | | |"
    events = row["event_ms"]["median"] if row["event_ms"] else None
    numbers = (row["wall_ms"]["median"], events, row.get("images/s"), row.get("outside_ms"), row.get("overhead"))
    return " | ".join("" if number is None else f"{number:.4g}" for number in numbers)


def _kernels(cases: dict[str, dict[str, dict]]) -> str:
    lines = ["| kernels | | µs | GB/s | of a copy |", "|---|---|---|---|---|"]
    for case, rows in cases.items():
        for name, row in rows.items():
            if "skipped" in row:
                cells = f"{row['skipped'][:90]} | | "
            else:
                share = f"{row['of_copy']:.0%}" if "of_copy" in row else ""
                cells = f"{row['seconds'] * 1e6:.4g} | {row['GB/s']:.4g} | {share}"
            lines.append(f"| {case} | {name} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
