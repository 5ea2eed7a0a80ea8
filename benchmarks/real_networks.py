"""A yardstick of networks that nobody here trained: every training-free solver, schedule and first step, beside `fit`.

    python benchmarks/real_networks.py sweep --jobs 2
    python benchmarks/real_networks.py fit --network hsc32 --nfe 5
    python benchmarks/real_networks.py calibrate --network hsc32 --nfe 5
    python benchmarks/real_networks.py table --nfe 5

The networks are the eight of galaxygrad 0.1.9, downloaded from PyPI into a temporary folder (see galaxygrad.py), and the
bundled `digits`. A sweep adds what is missing to results/real-networks-cpu.json, NFE 5 first, and may be stopped and
started again. Errors are RMSE and median to the solution of DEIS-4 in 80 evaluations, whose own error is stated.
"""

from __future__ import annotations

import json
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).parent))

import galaxygrad
import real_sweep
from harness import environment
from real_tables import report

from amed_engine.checkpoints import atomic_write
from amed_engine.engine.seeds import parse_seeds

FILE = Path(__file__).parent / "results" / "real-networks-cpu.json"
NFES = "5,3-4,6-10"  # the most asked for first
# The networks in torch against the package's own in JAX, once: float32, six inputs each, t from 1e-4 to 9.9.
VERIFIED = {"jax": "0.10.2", "equinox": "0.13.8", "largest_difference_over_largest_answer": 9.3e-7}


class Results:
    """The file: networks by name, their facts, sweep[nfe][schedule][first][solver] = [rmse, median] and fit[nfe]."""

    def __init__(self, file: Path):
        self.file = file
        self.data: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {"networks": {}}

    def of(self, name: str) -> dict[str, Any]:
        return self.data["networks"].setdefault(name, {"sweep": {}, "fit": {}})

    def samples(self, name: str, asked: int | None) -> int:
        """Latents of this network: what the file has, or else what is asked for. Raises UsageError where these differ."""
        own = self.of(name).get("samples")
        if None not in (own, asked) and own != asked:
            raise click.UsageError(
                f"{self.file} has {own} latents of {name}, got --samples {asked}; give another --out"
            )
        return own or asked or real_sweep.default_samples(name)

    def write(self) -> None:
        command = f"python benchmarks/real_networks.py {shlex.join(sys.argv[1:])}"
        made = [*self.data.get("commands", []), command]
        head = {"package": galaxygrad.PACKAGE, "sha256": galaxygrad.SHA256, "verified": VERIFIED}
        head |= {"commands": list(dict.fromkeys(made)), "environment": environment()}
        self.data = {**head, "networks": self.data["networks"]}
        atomic_write(self.file, dump(self.data).encode())


def dump(data: Any, depth: int = 6, indent: str = "") -> str:
    """JSON with the solvers of one first step in a line, so that a change of one shows as one."""
    if not isinstance(data, dict) or not data or not depth:
        return json.dumps(data)
    inner = ",\n".join(
        f"{indent} {json.dumps(key)}: {dump(value, depth - 1, indent + ' ')}" for key, value in data.items()
    )
    return f"{{\n{inner}\n{indent}}}" + ("" if indent else "\n")


def in_turns(
    jobs: int, tasks: Iterable[tuple[Callable[[Any], None], Callable[..., Any], tuple]], results: Results
) -> None:
    """Every task (keep, work, arguments) in one of `jobs` processes of a thread each; what it found is kept and written."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        waiting: dict[Future, tuple[Callable[[Any], None], tuple]] = {}
        for keep, work, arguments in tasks:
            waiting[pool.submit(work, *arguments)] = keep, arguments
        for number, done in enumerate(as_completed(waiting), 1):
            keep, arguments = waiting[done]
            keep(done.result())
            results.write()
            click.echo(f"{number}/{len(waiting)} {' '.join(map(str, arguments))}")


@click.group()
def main() -> None:
    """Measure solvers on trained networks that are not ours."""


networks = click.option("--network", "names", type=click.Choice(real_sweep.NETWORKS), multiple=True)
out = click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=FILE, help="The JSON file.")
workers = click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes of a thread each."
)
latents = click.option("--samples", type=click.IntRange(min=32), help="Latents; 256, or 96 above 32² pixels.")


@main.command()
@networks
@click.option("--nfe", default=NFES, show_default=True, help="E.g. 5 or 3-10.")
@latents
@workers
@out
def sweep(names: tuple[str, ...], nfe: str, samples: int | None, jobs: int, out: Path) -> None:
    """Measure what the file does not hold yet."""
    results, names = Results(out), names or real_sweep.NETWORKS
    real_sweep.prepare(names)
    counts = {name: results.samples(name, samples) for name in names}
    fresh = [name for name in names if "samples" not in results.of(name)]
    in_turns(jobs, ((results.of(n).update, real_sweep.facts, (n, counts[n])) for n in fresh), results)
    missing = [
        (results.of(name)["sweep"].setdefault(str(number), {}), (name, counts[name], number, schedule))
        for number in parse_seeds(nfe, "numbers of evaluations")
        for name in names
        for schedule in real_sweep.SCHEDULES
        if schedule not in results.of(name)["sweep"].get(str(number), {})
    ]
    in_turns(jobs, ((keep_as(into, wish[-1]), real_sweep.measure, wish) for into, wish in missing), results)


@main.command()
@networks
@click.option("--nfe", default="5", show_default=True, help="E.g. 5 or 3-10.")
@click.option("--latents", "count", type=click.IntRange(min=8), default=512, show_default=True, help="To fit on.")
@workers
@out
def fit(names: tuple[str, ...], nfe: str, count: int, jobs: int, out: Path) -> None:
    """Fit a predictor where the file holds none yet, and measure it on the latents of the sweep."""
    results, names = Results(out), names or real_sweep.NETWORKS
    real_sweep.prepare(names)
    missing = [
        (results.of(name)["fit"], (name, results.samples(name, None), number, count))
        for number in parse_seeds(nfe, "numbers of evaluations")
        for name in names
        if str(number) not in results.of(name)["fit"]
    ]
    in_turns(jobs, ((keep_as(into, str(wish[2])), real_sweep.fitted, wish) for into, wish in missing), results)


@main.command()
@networks
@click.option("--nfe", default="5", show_default=True, help="E.g. 5 or 3-10.")
@workers
@out
def calibrate(names: tuple[str, ...], nfe: str, jobs: int, out: Path) -> None:
    """Calibrate where the file holds none yet, and measure what was chosen on the latents of the sweep."""
    results = Results(out)
    missing = [
        (results.of(name).setdefault("calibrate", {}), (name, results.samples(name, None), number))
        for number in parse_seeds(nfe, "numbers of evaluations")
        for name in names or real_sweep.NETWORKS
        if str(number) not in results.of(name).get("calibrate", {})
    ]
    in_turns(jobs, ((keep_as(into, str(wish[2])), real_sweep.calibrated, wish) for into, wish in missing), results)


def keep_as(into: dict[str, Any], name: str) -> Callable[[Any], None]:
    return lambda found: into.__setitem__(name, found)


@main.command()
@networks
@click.option("--nfe", default="3-10", show_default=True, help="E.g. 5 or 3-10.")
@click.option("--by", type=click.Choice(["rmse", "median"]), default="rmse", show_default=True)
@click.option(
    "--rows", type=click.IntRange(min=1), default=5, show_default=True, help="Rules shown of each first step."
)
@out
def table(names: tuple[str, ...], nfe: str, by: str, rows: int, out: Path) -> None:
    """Which training-free rule comes nearest to the best combination of every network, by what is measured so far."""
    click.echo(report(Results(out).data["networks"], names, parse_seeds(nfe, "numbers of evaluations"), by, rows))


if __name__ == "__main__":
    main()
