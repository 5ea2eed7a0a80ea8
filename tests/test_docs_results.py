"""docs/results.md: every table has its command and says what the files in benchmarks/results say."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "results.md").read_text("utf-8")
SECTIONS = {section.partition("\n")[0]: section for section in PAGE.split("\n## ")[1:]}
TABLE = re.compile(r"^\|.*\|\n\|[-|]+\|\n((?:\|.*\|\n)+)", flags=re.MULTILINE)
COMMAND = re.compile(r"^    (?:\S*/)?(python|amed) (.+)$", flags=re.MULTILINE)


def cells(title: str) -> dict[str, list[str]]:
    """First cell -> the others, of the rows of a section's table."""
    (rows,) = TABLE.findall(SECTIONS[title])
    split = [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    return {name: rest for name, *rest in split}


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text("utf-8"))


@pytest.mark.parametrize("title", [title for title, text in SECTIONS.items() if "\n|" in text])
def test_a_table_stands_below_its_commands(title):
    (table,) = TABLE.finditer(SECTIONS[title])
    commands = [shlex.split(line) for _, line in COMMAND.findall(SECTIONS[title][: table.start()])]
    assert commands
    for script, *arguments in commands:
        source = (ROOT / script).read_text("utf-8")
        assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in source] == []


def test_only_tables_of_measurements_are_on_the_page():
    assert len(TABLE.findall(PAGE)) == 13


DIGITS = {
    "fitted (bundled)": "nonstationary",
    "iPNDM-3": "ipndm-3",
    "iPNDM-2": "ipndm-2",
    "DEIS-3": "deis-3",
    "DPM-Solver++ 2M, noise": "dpmpp-2 noise",
    "UniPC-3": "unipc-3",
    "DPM-Solver++ 3M, noise": "dpmpp-3 noise",
    "DPM-Solver++ 3M, data": "dpmpp-3 data",
    "iPNDM-4": "ipndm-4",
    "Euler = DDIM": "euler",
    "DPM-Solver-2": "dpm-2",
    "Heun": "heun",
}


def best(rows: list[dict], solver: str) -> list[dict]:
    """A solver's row of least error at each NFE from 3 to 10."""
    own = [row for row in rows if row["solver"] == solver]
    return [min((row for row in own if row["nfe"] == nfe), key=lambda row: row["rmse"]) for nfe in range(3, 11)]


def test_every_solver_is_shown_at_its_best():
    data, title = load("quality-digits.json"), "Every solver on the bundled model"
    measured = {
        name: [f"{row['rmse']:.3f} / {row['fd_reference_pixels']:.3f}" for row in best(data["rows"], name)]
        for name in {row["solver"] for row in data["rows"]}
    }
    assert {DIGITS[label]: numbers for label, numbers in cells(title).items()} == measured
    assert [run["command"] for run in data["runs"] if f"    {run['command']}\n" not in SECTIONS[title]] == []


@pytest.mark.parametrize(
    ("label", "variant", "part"),
    [
        ("fitted, seed 0", "nonstationary", "recorded"),
        ("the same on fresh latents", "nonstationary", "fresh"),
        ("AMED-Solver distilled here", "amed-solver", "recorded"),
    ],
)
def test_predictors_for_the_reference_network_are_shown_as_measured(label, variant, part):
    rows = load("reference_digits/fit-reference.json")["rows"]
    measured = [rows.get(f"{variant}-nfe{nfe}-seed0", {}).get(part) for nfe in range(3, 11)]
    numbers = [m and f"{m['rmse']:.3f} / {m['fd']:.{2 if m['fd'] >= 1 else 3}f}" for m in measured]
    assert cells("Against the published method")[label] == [number or "" for number in numbers]


VARIANTS = {
    "`nonstationary`, seed 0": "nonstationary-nfe5-seed0",
    "`nonstationary`, seed 1": "nonstationary-nfe5-seed1",
    "`nonstationary`, seed 2": "nonstationary-nfe5-seed2",
    "`nonstationary`, noise levels fixed": "nonstationary-fixed-levels-nfe5-seed0",
    "`adaptive`, 8 codes, ridge 1": "adaptive-few-codes-nfe5-seed0",
    "`constants`: r and two scales per step": "constants-nfe5-seed0",
    "`constants` and noise levels": "constants-levels-nfe5-seed0",
    "`epd`, two parallel points": "epd-nfe5-seed0",
    "`epd` and noise levels": "epd-levels-nfe5-seed0",
    "`distill`: the paper's AMED-Solver": "amed-solver-nfe5-seed0",
    "`distill`, scale_time 0.2": "amed-solver-scale-time-nfe5-seed0",
    "`distill`, wide scales": "amed-solver-wide-nfe5-seed0",
    "`distill`, wide scales, end to end": "amed-solver-end-to-end-nfe5-seed0",
}


def test_variants_are_shown_as_measured():
    rows, shown = load("reference_digits/fit-reference.json")["rows"], cells("What each variant is worth")
    assert shown.keys() == VARIANTS.keys()
    for label, name in VARIANTS.items():
        row = rows[name]
        numbers = [row["recorded"]["rmse"], row["recorded"]["median"], row["recorded"]["fd"]]
        numbers += [row["fresh"]["rmse"], row["fresh"]["fd"]]
        evaluations = f"{round(row['evaluations'], -3):,}" if "evaluations" in row else "about 200,000"
        assert shown[label] == [*(f"{n:.4f}" for n in numbers), evaluations, f"{row['fit_seconds']:.0f}"], label


# ---- networks of others


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import real_tables

    yield real_tables
    sys.modules.pop("real_tables")


def networks(names) -> dict[str, dict]:
    measured = load("real-networks-cpu.json")["networks"]
    return {name: measured[name] for name in names}


def test_networks_of_others_are_shown_as_measured(tables):
    shown = cells("Networks of others")
    (head,) = re.findall(r"^\| NFE 5: RMSE / median \| (.+) \|$", SECTIONS["Networks of others"], flags=re.MULTILINE)
    names = re.findall(r"`([^`]+)`", head)
    assert set(names) == {*tables.YARDSTICK, *tables.BESIDE}
    for column, (name, network) in enumerate(networks(names).items()):
        rmse, median = (tables.errors(network, 5, by) for by in ("rmse", "median"))
        best = min(rmse, key=rmse.get)
        rows = {"best of the sweep, in hindsight": best}
        titles = ('default, `afs="mean"`', "default, plain", "iPNDM-2, `time_uniform`, zero")
        rows |= dict(zip(titles, tables.defaults(5), strict=True))
        pairs = {title: (rmse[rule], median[rule]) for title, rule in rows.items()}
        pairs |= {f"`{kind}`": network[kind]["5"]["error"] for kind in ("calibrate", "fit") if "5" in network[kind]}
        pairs["best of its first 12, in hindsight"] = network["calibrate"]["5"]["best"]
        got = {title: numbers[column] for title, numbers in shown.items() if numbers[column]}
        assert got == {title: f"{a:.3f} / {b:.3f}" for title, (a, b) in pairs.items()}, name


def test_the_default_is_shown_as_measured(tables):
    shown, six = cells("The default on networks of others"), networks(tables.YARDSTICK)
    numbers = {nfe for nfe in range(3, 11) if all(tables.errors(network, nfe, "rmse") for network in six.values())}
    assert set(shown) == {str(nfe) for nfe in numbers}
    for nfe in numbers:
        by = {name: tables.costs(six, nfe, name) for name in ("rmse", "median")}
        own = {rule[0]: rule for rule in tables.defaults(nfe)}
        asked = [("rmse", "mean"), ("rmse", "plain"), ("rmse", "zero"), ("median", "mean"), ("median", "plain")]
        pairs = [tables.score(by[name][own[first]]) for name, first in asked]
        assert shown[str(nfe)] == [f"{mean:.2f} / {worst:.2f}" for mean, worst in pairs]


def test_a_stranger_would_choose_about_the_same(tables):
    found = tables.costs(networks(tables.YARDSTICK), 5, "rmse")
    for first, words in (("mean", "about the mean"), ("plain", "plain")):
        costs = [cost for _, cost in tables.left_out(found, first).values()]
        said = f"{math.prod(costs) ** (1 / len(costs)):.2f} / {max(costs):.2f} {words}"
        assert said in SECTIONS["The default on networks of others"].replace("\n", " ")


# ---- datasets


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("What writing a dataset costs", "datasets-speed.json"),
        ("Datasets drawn while processes are killed", "datasets-kill.json"),
    ],
)
def test_datasets_are_shown_as_measured(title, name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_datasets

    (shown,) = TABLE.finditer(SECTIONS[title])
    assert shown[0].strip() == bench_datasets.table_of(load(name))


@pytest.mark.parametrize(
    ("title", "part"),
    [
        ("Requests of unlike evaluations at once", "saturation"),
        ("Short requests beside long ones", "latency"),
        ("Servers under one load", "servers"),
        ("What a tick costs beside its network", "overhead"),
    ],
)
def test_serving_is_shown_as_measured(title, part, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_serving

    (shown,) = TABLE.finditer(SECTIONS[title])
    assert shown[0].strip() == bench_serving.table_of(part, load("serving-cpu.json"))


def test_every_kind_of_process_drew_the_same_samples_whoever_was_killed():
    found = load("datasets-kill.json")
    assert set(found["kinds"]) == {"process", "workers", "torchrun", "ray"}
    for each in found["kinds"].values():
        after = each["after"]
        assert (after["samples"], after["twice"], after["half"], after["litter"]) == (found["samples"], 0, [], [])
        assert len({each["set"], after["set"], found["kinds"]["process"]["set"]}) == 1
        assert len(each["kills"]) == 5
        assert each["peak_mib"] < 1.1 * each["peak_mib_of_a_tenth"]
