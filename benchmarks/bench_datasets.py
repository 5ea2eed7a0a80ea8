"""Datasets of 50,000 digits: the same by every kind of process, whoever is killed meanwhile, and what writing them costs.

    python benchmarks/bench_datasets.py kill --out datasets-kill.json
    python benchmarks/bench_datasets.py speed --baseline PATH --out datasets-speed.json
    python benchmarks/bench_datasets.py table FILE...

`kill` draws the digits by one process, `--workers 2`, torchrun with two ranks and two actors of a local Ray cluster, and again
by each while one of its processes, chosen by chance, is killed by SIGKILL at random moments; what ends before it is done is
started again. `speed` draws in turns: nothing but samples, each format, the last one by the same loop exported to ONNX too, and
the `amed sample --outdir` of a checkout of commit b436505, which wrote a PNG per seed.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from dataset_runs import KINDS, Wanted, Watched, contents
from harness import environment

from amed_engine import Sampler

BASELINE = "b436505"
TIMED = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
from amed_engine.cli import main
started = time.perf_counter()
try:
    main(sys.argv[3:])
except SystemExit as ended:
    assert not ended.code, ended.code
open(sys.argv[1], "w").write(str(time.perf_counter() - started))
"""
DRAWING = """
import sys, time
import torch
import amed_engine.cli
started = time.perf_counter()
from amed_engine import Sampler
from amed_engine.datasets.drawing import rows_of, threads
from amed_engine.datasets.generate import make_job
from amed_engine.datasets.seeds import Seeds
from amed_engine.datasets.sources import open_source
source = open_source(Sampler("digits", nfe=int(sys.argv[3])))
job, labels = make_job(source, Seeds.of(sys.argv[4]), None, "npz", int(sys.argv[5]), None, int(sys.argv[2]))
with threads(job.threads):
    for shard in range(job.shards):
        for rows in job.batches(shard):
            rows_of(job, rows, labels, source)
open(sys.argv[1], "w").write(str(time.perf_counter() - started))
"""


@click.group()
def app() -> None:
    """Datasets of digits, killed and timed."""


# ---- killed


@app.command()
@click.option("--samples", type=click.IntRange(min=100), default=50_000)
@click.option("--kills", type=click.IntRange(min=0), default=5, help="Of each kind.")
@click.option("--kinds", default=",".join(KINDS), help="Of process, workers, torchrun and ray.")
@click.option("--format", "form", default="npz")
@click.option("--shard", type=click.IntRange(min=1), default=1000)
@click.option("--seed", type=int, default=0, help="Of the moments and of who is killed.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the numbers; what is there of other kinds stays.")
def kill(samples: int, kills: int, kinds: str, form: str, shard: int, seed: int, out: str | None) -> None:
    """Draw by every kind of process, undisturbed and killed at random moments."""
    wanted = Wanted(samples, format=form, shard=shard)
    settings = {"samples": samples, "format": form, "shard": shard}
    found = {**settings, "environment": environment(), "kinds": begun(out, settings).get("kinds", {})}
    for kind in kinds.split(","):
        with tempfile.TemporaryDirectory(prefix="datasets-") as folder:
            found["kinds"][kind] = one_kind(kind, wanted, kills, random.Random(f"{kind} {seed}"), Path(folder))
        click.echo(f"{kind}: {json.dumps({k: v for k, v in found['kinds'][kind].items() if k != 'kills'})}")
        save(out, found)
    if wrong := complaints(found):
        raise click.ClickException("; ".join(wrong))


def begun(out: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run with the same settings wrote, or nothing."""
    found = json.loads(Path(out).read_text()) if out and Path(out).exists() else {}
    return found if settings.items() <= found.items() else {}


def one_kind(kind: str, wanted: Wanted, kills: int, chance: random.Random, folder: Path) -> dict[str, Any]:
    """Undisturbed, with a tenth of the samples for the memory, and killed."""
    started = time.monotonic()
    whole = Watched(wanted.command(kind, folder / "whole"), folder / "log")
    whole.wait()
    seconds = time.monotonic() - started
    tenth = replace(wanted, samples=wanted.samples // 10)
    small = Watched(tenth.command(kind, folder / "small"), folder / "log")
    small.wait()
    events, starts = killed(kind, wanted, kills, chance, folder / "killed", seconds)
    after, undisturbed = contents(folder / "killed"), contents(folder / "whole")
    return {
        "seconds": seconds,
        "set": undisturbed["set"],
        "peak_mib": max(whole.peaks.values()),
        "peak_mib_of_a_tenth": max(small.peaks.values()),
        "kills": events,
        "starts": starts,
        "after": {**after, "litter": sorted(set(after["files"]) - set(undisturbed["files"]))},
    }


def killed(
    kind: str, wanted: Wanted, kills: int, chance: random.Random, folder: Path, seconds: float
) -> tuple[list, int]:
    """Each kill: when, of whom and with how many samples there; and how often the command was started."""
    events, starts, run, log = [], 0, None, folder.with_name("log")
    while len(events) < kills or run is None or not complete(folder, wanted):
        if run is None or run.wait(0):
            if run is not None:
                run.settle()
                if complete(folder, wanted):
                    shutil.rmtree(folder)  # done too early: over again
            run, starts = Watched(wanted.command(kind, folder), log), starts + 1
        if len(events) < kills:
            moment = chance.uniform(0, 2 * seconds / (kills + 1))
            run.wait(moment)
            if (who := run.kill_one(chance)) is not None:
                events.append({"seconds": moment, "who": who, "shards": len(list(folder.glob("shard-*")))})
        else:
            run.wait()
            run.settle()
    return events, starts


def complete(folder: Path, wanted: Wanted) -> bool:
    return len(list(folder.glob("shard-*"))) == -(-wanted.samples // wanted.shard)


def complaints(found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    kinds, wrong = found["kinds"], []
    for kind, row in kinds.items():
        after = row["after"]
        good = {"samples": found["samples"], "twice": 0, "half": [], "litter": [], "set": row["set"]}
        wrong += [
            f"{kind}: {name} is {after[name]}, expected {value}" for name, value in good.items() if after[name] != value
        ]
    if len({row["set"] for row in kinds.values()}) > 1:
        wrong.append("the kinds drew different samples")
    return wrong


# ---- timed


@app.command()
@click.option("--samples", type=click.IntRange(min=100), default=20_000)
@click.option("--rounds", type=click.IntRange(min=1), default=5)
@click.option("--nfe", type=int, default=5)
@click.option("--shard", type=click.IntRange(min=1), default=1000)
@click.option(
    "--threads", type=click.IntRange(min=1), multiple=True, default=(1, 2), help="Of torch, of all contestants."
)
@click.option("--formats", default="npz,webdataset,png", help="Also parquet, arrow, zarr.")
@click.option(
    "--baseline", type=click.Path(exists=True, file_okay=False), help=f"A checkout of {BASELINE} with its .venv."
)
@click.option("--out", type=click.Path(dir_okay=False), help="Write the numbers; what is there of other threads stays.")
def speed(samples, rounds, nfe, shard, threads, formats, baseline, out) -> None:
    """Time drawing alone, each format, an exported loop, two workers, and `amed sample --outdir` as it was, in turns."""
    if baseline:
        check_baseline(Path(baseline))
    seeds = f"0-{samples - 1}"
    settings = {"samples": samples, "nfe": nfe, "shard": shard}
    others = [row for row in begun(out, settings).get("rows", []) if row["threads"] not in threads]
    found = {**settings, "environment": environment(), "rows": others}
    loop = exported(nfe, Path(click.get_current_context().with_resource(tempfile.TemporaryDirectory())))
    for count in threads:
        contestants = commands(seeds, nfe, shard, count, formats.split(","), loop, baseline)
        times: dict[str, list[float]] = {name: [] for name in contestants}
        order = list(contestants)
        for _ in range(rounds):
            for name in order:
                times[name].append(timed(contestants[name]))
            order.reverse()
        found["rows"] += [row(name, count, times) for name in contestants]
        save(out, found)
    click.echo(table_of(found))


def check_baseline(checkout: Path) -> None:
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if not head.startswith(BASELINE):
        raise click.UsageError(f"{checkout} is at {head or 'no commit'}; check out {BASELINE} there")


def exported(nfe: int, folder: Path) -> Path:
    """The loop as an ONNX model, made before anything is timed."""
    path = folder / "loop.onnx"
    Sampler("digits", nfe=nfe, device="cpu").export(path, "onnx", max_batch=64)
    return path


def commands(
    seeds: str, nfe: int, shard: int, threads: int, formats: list[str], loop: Path, baseline: str | None
) -> dict[str, list[str]]:
    """Contestants; {file} and {folder} stand for where to write."""
    told, python = ["--model", "digits", "--nfe", str(nfe), "--seeds", seeds], [sys.executable, "-P", "-c"]
    timed = [*python, TIMED, "{file}", str(threads)]
    where = ["--out", "{folder}", "--shard", str(shard), "--threads", str(threads)]
    generate = [*timed, "generate", *told, *where]
    found = {"drawing alone": [*python, DRAWING, "{file}", str(threads), str(nfe), seeds, str(shard)]}
    found |= {form: [*generate, "--format", form] for form in formats}
    drawn = ["generate", "--package", str(loop), "--seeds", seeds, *where, "--format", formats[-1]]
    found[f"{formats[-1]}, exported loop"] = [*timed, *drawn]
    if threads == 1:
        found[f"{formats[0]}, two workers"] = [*generate, "--format", formats[0], "--workers", "2"]
    if baseline:
        old = [str(Path(baseline).absolute() / ".venv" / "bin" / "python"), *timed[1:]]
        found["sample --outdir before"] = [*old, "sample", *told, "--outdir", "{folder}"]
    return found


def timed(command: list[str]) -> float:
    """Seconds of the work in a process of its own, after its imports."""
    with tempfile.TemporaryDirectory(prefix="datasets-") as folder:
        places = {"{file}": f"{folder}/seconds", "{folder}": f"{folder}/data"}
        done = subprocess.run([places.get(word, word) for word in command], cwd="/", capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{command[3:]} failed: {done.stderr.strip()[-500:]}")
        return float(Path(places["{file}"]).read_text())


def row(name: str, threads: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians; ratios are those of the same round."""
    own = times[name]

    def ratio(others: list[float]) -> float:
        return statistics.median(mine / other for mine, other in zip(own, others, strict=True))

    ratios = {other: ratio(seconds) for other, seconds in times.items() if other != name}
    return {"contestant": name, "threads": threads, "seconds": own, "median": statistics.median(own), "ratios": ratios}


def save(out: str | None, found: dict[str, Any]) -> None:
    if out:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")


# ---- told


@app.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
def table(files: tuple[str, ...]) -> None:
    """Tables of such files, in Markdown."""
    click.echo("\n\n".join(table_of(json.loads(Path(file).read_text())) for file in files))


def table_of(found: dict[str, Any]) -> str:
    return speed_table(found) if "rows" in found else kill_table(found)


def speed_table(found: dict[str, Any]) -> str:
    lines = [
        "| threads, contestant | seconds | of drawing alone | of `amed sample --outdir` before |",
        "|---|---|---|---|",
    ]
    for each in found["rows"]:
        ratios = [each["ratios"].get(other) for other in ("drawing alone", "sample --outdir before")]
        cells = [f"{each['median']:.1f}", *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios)]
        lines.append(f"| {each['threads']}, {each['contestant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kill_table(found: dict[str, Any]) -> str:
    head = ("drawn by", "kills", "starts", "samples", "twice", "half", "litter", "peak, MiB", "of a tenth")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind, each in found["kinds"].items():
        after = each["after"]
        cells = [len(each["kills"]), each["starts"], f"{after['samples']:,}", after["twice"], len(after["half"])]
        cells += [len(after["litter"]), f"{each['peak_mib']:.0f}", f"{each['peak_mib_of_a_tenth']:.0f}"]
        lines.append(f"| {kind} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    app()
