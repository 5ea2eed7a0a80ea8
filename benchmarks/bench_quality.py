"""Quality of samples, solver x NFE: training-free solvers on every schedule with each first step, and predictors.

    python benchmarks/bench_quality.py --network digits --nfe 3-10
    python benchmarks/bench_quality.py --network reference_digits --nfe 5 --only ipndm-2 --predictor "mine=p.safetensors"

Writes quality-NETWORK.json and .png. A run adds its rows to those of the file, or replaces them, so the whole may be
measured in pieces; every row says which run it comes from. The table and the picture show the best of each solver.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode adds nothing itself

from harness import environment
from quality import SCHEDULES, Absent, measure, samplers, yardstick

from amed_engine.checkpoints import atomic_write
from amed_engine.engine.seeds import parse_seeds
from amed_engine.errors import AmedError, ConfigError
from amed_engine.evaluation.comparison import TRAINING_FREE, Setting
from amed_engine.evaluation.figure import import_matplotlib, style

RESULTS = Path(__file__).parent / "results"
NFES = range(3, 11)
KEY = ("solver", "nfe", "schedule", "afs")
Row = dict[str, Any]


def merged(old: dict[str, Any] | None, header: dict[str, Any], made: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """The file with a run's rows in it. Raises ConfigError where the file's rows are of other samples."""
    old = old or {**header, "runs": [], "rows": []}
    if different := [name for name, value in header.items() if old.get(name) != value]:
        raise ConfigError(
            f"the results there are of {different[0]}={old.get(different[0])}, this run of {header[different[0]]}; "
            "write to another folder with --out"
        )
    runs = old["runs"] if made in old["runs"] else [*old["runs"], made]
    kept = {_key(row): row for row in old["rows"]} | {_key(row): {**row, "run": runs.index(made)} for row in rows}
    everyone = sorted(kept.values(), key=lambda row: (row["nfe"], row["rmse"]))
    used = sorted({row["run"] for row in everyone})  # runs whose rows were all replaced are forgotten
    numbered = [{**row, "run": used.index(row["run"])} for row in everyone]
    return {**header, "runs": [runs[run] for run in used], "rows": numbered}


def _key(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def best(rows: Iterable[Row], by: str = "rmse") -> dict[str, dict[int, Row]]:
    """solver -> NFE -> its best row, over schedules and AFS; what is learned first, then by the mean."""
    found: dict[str, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: row[by], reverse=True):
        found.setdefault(row["solver"], {})[row["nfe"]] = row
    mean = {name: sum(row[by] for row in points.values()) / len(points) for name, points in found.items()}
    return dict(sorted(found.items(), key=lambda item: (item[0] in TRAINING_FREE, mean[item[0]])))


def table(rows: Sequence[Row]) -> str:
    """Markdown: RMSE / Frechet distance of pixels to the reference, the best of each solver at each NFE."""
    nfes = sorted({row["nfe"] for row in rows})
    lines = ["| RMSE / FD to reference |" + "".join(f" NFE {nfe} |" for nfe in nfes), "|---" * (len(nfes) + 1) + "|"]
    for name, points in best(rows).items():
        cells = (_cell(points.get(nfe)) for nfe in nfes)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row['rmse']:.4f} / {row['fd_reference_pixels']:.3f}"


PANELS = {
    "rmse": "RMSE to the fine solution",
    "fd_reference_pixels": "Frechet distance to it, pixels",
    "fd_data_digits": "Frechet distance to the data, digit features",
}


def plot(data: dict[str, Any]) -> bytes:
    """A PNG: a panel per measure, a curve per solver, each point the best of its schedules by that measure."""
    figure = import_matplotlib().Figure(figsize=(5.2 * len(PANELS) + 1.6, 4.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    figure.suptitle(f"{data['network']}: {data['samples']} samples, best schedule of each solver")
    for panel, (measure_, label) in zip(axes, PANELS.items(), strict=True):
        for name, points in best(data["rows"], measure_).items():
            colour, dash = style(name)
            look = {"linewidth": 2.5, "marker": "*", "markersize": 11} if colour == "black" else {"marker": "."}
            nfes = sorted(points)
            panel.plot(nfes, [points[n][measure_] for n in nfes], color=colour, linestyle=dash, label=name, **look)
        panel.set(yscale="log", xlabel="network evaluations (NFE)", title=label, xticks=list(NFES))
        panel.grid(True, which="both", alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def dump(data: dict[str, Any]) -> bytes:
    """JSON with a row a line, so that a change of one shows as one."""
    head = json.dumps({name: value for name, value in data.items() if name != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in data["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'.encode()


def measure_into(file: Path, network: str, samples: int, setting: Setting, **chosen: Any) -> dict[str, Any]:
    """Measure every sampler chosen, each written to the file at once; what the file holds then.

    Raises Absent and ConfigError.
    """
    facts, done = environment(torch.device(setting.device or "cpu")), []
    made = {"command": f"python benchmarks/bench_quality.py {shlex.join(sys.argv[1:])}"}
    made |= {name: facts[name] for name in ("commit", "dirty", "torch", "cpu", "gpu", "threads", "time")}
    data = json.loads(file.read_text("utf-8")) if file.is_file() else None
    with tqdm(unit="eval", unit_scale=True, disable=None) as bar:
        yard = yardstick(network, samples, setting, bar)
        for name, sampler in samplers(yard, **chosen):
            data = merged(data, yard.header(), made, [measure(yard, name, sampler, bar)])
            atomic_write(file, dump(data))
            done.append(name)
    if data is None or not done:
        raise ConfigError("nothing was measured: no solver of --only spends one of these --nfe on these schedules")
    atomic_write(file.with_suffix(".png"), plot(data))
    return data


@click.command()
@click.option("--network", default="digits", show_default=True, help="digits, reference_digits, or a path.")
@click.option("--nfe", "nfes", default="3-10", show_default=True, help="E.g. 5 or 3-10 or 3,5.")
@click.option("--only", multiple=True, help="Only this name, e.g. ipndm-2; repeat for more.")
@click.option("--schedule", "schedules", type=click.Choice(SCHEDULES), multiple=True, default=SCHEDULES)
@click.option("--predictor", "predictors", multiple=True, metavar="[NAME=]PATH", help="Instead of the bundled ones.")
@click.option("--samples", type=click.IntRange(min=8), default=512, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--device", default="cpu", show_default=True, help="E.g. cuda; convolutions then run without TF32.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="Folder of the results.")
def main(network, nfes, only, schedules, predictors, samples, batch, threads, device, out) -> None:
    """Measure quality, solver x NFE, and write quality-NETWORK.json and .png."""
    torch.set_num_threads(threads or torch.get_num_threads())
    if device != "cpu":
        torch.backends.cudnn.allow_tf32 = False
    file = out / f"quality-{Path(network).stem}.json"
    try:
        chosen = {"nfes": parse_seeds(nfes), "schedules": schedules, "only": only, "predictors": predictors}
        data = measure_into(file, network, samples, Setting(batch=batch, device=device), **chosen)
        click.echo(table(data["rows"]))
    except Absent as reason:
        click.echo(f"skipped: {reason}")
    except AmedError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
