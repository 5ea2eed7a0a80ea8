"""The measuring instrument: that it sees a known time, treats contestants alike and says where it ran."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    yield harness
    # The modules of benchmarks/ have everyday names; leave none behind.
    for name in [name for name, module in sys.modules.items() if _lies_in_benchmarks(module)]:
        del sys.modules[name]


def _lies_in_benchmarks(module):
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).parent == BENCHMARKS


@pytest.fixture
def gpu_report(harness):
    import gpu_report

    return gpu_report


class CountingClock:
    """A device whose every measurement takes one more tick; counts how often it was waited for."""

    def __init__(self):
        self.waits = 0

    def time(self, work):
        work()
        self.waits += 1
        return float(self.waits), float(self.waits) / 2, 0.0


def test_a_sleep_of_a_millisecond_is_seen(harness):
    work = {"sleep": (lambda: time.sleep(1e-3), 1), "ten sleeps": (lambda: time.sleep(1e-2), 10), "nothing": (int, 1)}
    times = harness.measure(work, harness.HostClock(), rounds=15)
    # A loaded machine only ever adds: the shortest of fifteen is the sleep.
    assert min(times["sleep"].wall) >= 1e-3
    assert min(times["ten sleeps"].wall) >= 1e-3
    assert min(times["sleep"].wall) - min(times["nothing"].wall) > 0.9e-3
    assert times["sleep"].summary()["wall_ms"]["min"] >= 1.0
    assert times["sleep"].summary()["event_ms"] is None


@pytest.mark.gpu
def test_events_see_what_the_device_does_and_wall_time_covers_it(harness):
    cycles = 10_000_000  # some milliseconds
    times = harness.measure({"spin": (lambda: torch.cuda._sleep(cycles), 1)}, harness.CudaClock())
    assert min(times["spin"].events) > 1e-3
    for wall, events, submit in zip(times["spin"].wall, times["spin"].events, times["spin"].submit, strict=True):
        assert submit < events <= wall


@pytest.mark.gpu
def test_a_measurement_waits_for_the_device_once(harness, monkeypatch):
    waits, wait = [], torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (waits.append(event), wait(event)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        harness.measure({"work": (lambda: torch.cuda._sleep(1000), 1)}, harness.CudaClock(), rounds=5, warmups=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 7


def test_contestants_take_turns_and_the_order_flips(harness):
    order = []
    work = {name: (lambda name=name: order.append(name), 1) for name in "abc"}
    clock = CountingClock()
    times = harness.measure(work, clock, rounds=6, warmups=2)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "abc", "abc", "cba", "abc", "cba", "abc", "cba"]
    assert clock.waits == 3 * 8
    # Warm-ups are not kept, and over an even number of rounds nobody runs later than another on average.
    assert all(len(t.wall) == 6 for t in times.values())
    assert sum(times["a"].wall) == sum(times["b"].wall) == sum(times["c"].wall)
    assert times["a"].events == [wall / 2 for wall in times["a"].wall]


def test_five_rounds_are_taken_however_short_the_budget(harness):
    times = harness.measure({"a": (int, 1)}, CountingClock(), rounds=50, budget=0.0)
    assert len(times["a"].wall) == 5


@pytest.mark.parametrize(("rounds", "warmups"), [(4, 2), (5, 1)])
def test_fewer_rounds_are_refused(harness, rounds, warmups):
    with pytest.raises(ValueError, match="at least 5 rounds after 2 warm-ups"):
        harness.measure({"a": (int, 1)}, CountingClock(), rounds=rounds, warmups=warmups)


def test_the_spread_is_that_of_the_numbers(harness):
    spread = harness.spread([k / 1000 for k in range(101)])  # 0, 1, ... 100 ms
    assert spread == pytest.approx({"median": 50, "iqr": 50, "p50": 50, "p90": 90, "p99": 99, "min": 0})


def test_a_wrong_or_broken_contestant_is_named_and_the_others_go_on(harness):
    def gives(value):
        return lambda: lambda: torch.full((3,), value)

    def missing():
        raise harness.Unavailable("not installed")

    def broken():
        raise RuntimeError("no kernel image")

    listed = [
        harness.Contestant("first", gives(1.0)),
        harness.Contestant("close", gives(1.0005)),
        harness.Contestant("wrong", gives(1.01)),
        harness.Contestant("not a number", gives(float("nan"))),
        harness.Contestant("another problem", gives(2.0), expected=lambda: torch.full((3,), 2.0)),
        harness.Contestant("missing", missing),
        harness.Contestant("broken", broken),
        harness.Contestant("slow to set up", gives(1.0), seconds=1e6),
    ]
    rows = harness.compete(listed, torch.device("cpu"), rounds=5, time_left=100.0)
    assert list(rows) == [contestant.name for contestant in listed]
    assert [name for name, row in rows.items() if "seconds" in row] == ["first", "close", "another problem"]
    assert rows["close"]["difference"] == pytest.approx(5e-4, rel=1e-3)
    assert rows["missing"]["skipped"] == "not installed"
    assert "no kernel image" in rows["broken"]["skipped"]
    assert "the time is up" in rows["slow to set up"]["skipped"]
    assert all("wrong result" in rows[name]["skipped"] for name in ("wrong", "not a number"))


def test_times_played_back_to_a_runner_are_those_taken(harness):
    player, taken = harness.Playback(), [0.25, 0.5, 0.125]
    assert player.load(taken) == 3
    told = []
    for _ in taken:
        start = player()
        told.append(player() - start)
    assert told == taken


def test_a_report_says_where_what_and_what_is_missing(gpu_report, tmp_path, capsys):
    arguments = ["--dry-run", "--out", str(tmp_path), "--suites", "samples", "--cases", "tiny-2"]
    assert gpu_report.main(arguments) == 0
    (file,) = tmp_path.glob("gpu-*.json")
    data = json.loads(file.read_text())
    for key in ("gpu", "driver", "torch", "triton", "cudnn", "python", "cpu", "threads", "commit", "dirty", "time"):
        assert key in data["environment"]
    assert data["environment"]["torch"] == torch.__version__
    rows = data["samples"]["tiny-2"]
    assert rows["engine fp32"]["difference"] <= rows["engine fp32"]["tolerance"]
    assert {"wall_ms", "event_ms", "submit_ms", "images/s", "outside_ms", "overhead"} <= set(rows["engine fp32"])
    printed = capsys.readouterr().out
    assert "| tiny-2 | engine fp32 |" in printed
    gpu_report.main([*arguments[:-1], "nothing of this name"])
    assert json.loads(file.read_text())["left_out"][0] == {
        "suite": "samples",
        "case": "tiny-2",
        "reason": "not asked for",
    }


def test_the_gpu_s_tests_are_where_a_report_looks(gpu_report):
    """A folder that is not there would end pytest before any test."""
    folders = [BENCHMARKS.parent / "tests" / name for name in gpu_report.FIRST]
    for folder in folders:
        assert any("mark.gpu" in file.read_text("utf-8") for file in folder.rglob("test_*.py")), folder
    assert folders[-1].samefile(BENCHMARKS.parent / "tests")


def test_a_report_has_ticks_beside_the_network_alone(gpu_report, tmp_path, capsys):
    assert gpu_report.main(["--dry-run", "--out", str(tmp_path), "--suites", "ticks"]) == 0
    (file,) = tmp_path.glob("gpu-*.json")
    found = json.loads(file.read_text())["ticks"]["tiny-2"]
    assert found["rows"] == 2
    assert all(ratio > 0 for ratio in found["tick_over_network"])
    assert "| rows | tick, ms |" in capsys.readouterr().out


def test_a_case_that_takes_too_long_is_stopped_and_the_report_still_written(gpu_report, monkeypatch, tmp_path):
    def forever(left):
        while True:
            with contextlib.suppress(Exception):  # as a contestant that breaks is passed over
                time.sleep(60)

    monkeypatch.setattr(gpu_report, "GRACE", 0.1)
    monkeypatch.setattr(gpu_report, "_cases", lambda *_: [("slow-1", 0.0, forever), ("quick-1", 5.0, dict)])
    assert gpu_report.main(["--dry-run", "--out", str(tmp_path), "--suites", "samples", "--minutes", "0.01"]) == 0
    data = json.loads(next(tmp_path.glob("gpu-*.json")).read_text())
    reasons = [(item["case"], item["reason"]) for item in data["left_out"]]
    assert reasons == [("slow-1", "stopped, it took too long"), ("quick-1", "no time left")]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_tests_that_take_too_long_tell_what_they_know_and_leave_no_process_behind(gpu_report, monkeypatch):
    monkeypatch.setattr(gpu_report, "GRACE", 3.0)
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
    script = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "try:\n    time.sleep(300)\nexcept KeyboardInterrupt:\n    print('one test failed', flush=True)\n"
    )
    said, code = gpu_report._run([sys.executable, "-c", script], 3.0)
    number, *rest = said.split("\n")
    assert code is None
    assert "one test failed" in rest
    deadline = time.monotonic() + 10
    while _runs(int(number)):
        assert time.monotonic() < deadline, "the child of a child outlived it"
        time.sleep(0.05)


def _runs(process: int) -> bool:
    """Whether it is there and more than a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_time_outside_the_network_is_seen(harness, monkeypatch):
    import contestants
    import workloads

    clock = [0.0]
    monkeypatch.setattr(contestants, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Busy(torch.nn.Module):
        def forward(self, x):
            clock[0] += 3
            return x

    contest = contestants.Contest(workloads.WORKLOADS["tiny"], 1, torch.device("cpu"))
    contest.network = Busy()

    def run():
        for outside in (0.5, 1.5):
            clock[0] += outside
            contest.network(contest.latents)

    assert contest.outside(run, times=4) == [0.25] * 4
    assert not contest.network._forward_hooks
    assert not contest.network._forward_pre_hooks


def test_what_was_measured_is_kept_where_asked_for(tmp_path):
    file = tmp_path / "new" / "cpu.json"
    command = [sys.executable, "-P", "-m", "pytest", str(BENCHMARKS / "bench_kernels.py"), "-p", "no:cacheprovider"]
    command += ["--benchmark-only", "-k", "cpu-combine-to-next-1x3x32x32 and not compile", "--results", str(file)]
    # Under a worker of pytest-xdist pytest-benchmark measures nothing.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(file.read_text())
    assert data["environment"]["torch"] == torch.__version__
    assert "--benchmark-only" in data["command"]
    rows = data["kernels"]["combine-to-next-1x3x32x32"]
    assert rows["unfused torch"]["over_unfused"] == 1
    assert len(rows["unfused torch"]["wall_seconds"]) == rows["unfused torch"]["rounds"] == 7
    assert data["targets"] == []  # none is about so small a tensor


def test_every_case_of_a_gpu_is_planned_once_with_compiled_contestants(harness):
    import bench_sampler

    device = torch.device("cuda", 0)
    planned = bench_sampler.plan(device)
    assert sorted(case for case, compiled in planned if compiled) == sorted(bench_sampler.cases(device))
    assert planned[:5] == [(("cifar10", 1), False), (("cifar10", 64), False), (("digits", 1), False), (("digits", 64), False),
                           (("cifar10", 1), True)]  # fmt: skip
    assert len(bench_sampler.cases(device)) == 4 * 4


def test_targets_are_read_out_of_the_rows(harness):
    from targets import judged

    kernels = {
        "combine-to-next-64x3x64x64": {"amed native": {"seconds": 1.0, "over_unfused": 1.4, "bytes": 1}},
        "combine-to-next-256x4x256x256": {"amed triton": {"seconds": 1.0, "of_copy": 0.95, "bytes": 3 * 2**28}},
        "midpoint-predictor-64x256x8x8": {"amed triton": {"seconds": 1e-5, "bytes": 1}},
    }
    samples = {
        "digits-64": {"engine fp32": {"seconds": 1.0, "event_ms": None, "overhead": 1.5, "outside_share": 0.02}},
        "cifar10-64": {
            "plain loop": {"seconds": 0.03},
            "engine fp32": {"seconds": 0.02, "event_ms": {"median": 20.0}, "overhead": 1.005},
            "engine bf16": {"seconds": 0.01, "event_ms": {"median": 10.0}, "overhead": 1.0},
            "engine fp32 compiled": {"skipped": "the time is up"},
        },
        "cifar10-1": {"all": {"skipped": "no memory"}},
    }
    told = {target.what: (round(target.value, 4), target.met) for target in judged(kernels, samples)}
    assert told == {
        "share of the time outside the denoiser, digits-64 on the CPU": (0.02, True),
        "overhead, cifar10-64": (1.005, True),
        "times faster than the plain loop, cifar10-64, engine bf16": (3.0, True),
        "times faster than unfused torch, combine-to-next-64x3x64x64 on the CPU": (1.4, False),
        "share of a copy's bandwidth, combine-to-next-256x4x256x256": (0.95, True),
        "the predictor's share of a sample, cifar10-64": (0.0015, True),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_without_a_gpu_the_report_fails_in_one_line(gpu_report, capsys):
    assert gpu_report.main([]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "gpu_report: torch sees no CUDA device; run this on a GPU machine, or with --dry-run"
    ]


def test_the_plain_loop_is_the_sampler_written_out(harness):
    """The baseline computes what this engine computes: otherwise the comparison would mean nothing."""
    import contestants
    import workloads

    contest = contestants.Contest(workloads.WORKLOADS["tiny"], 3, torch.device("cpu"))
    plain, engine = contest.published()(), contest.engine()()
    assert harness.difference(engine, plain) < 1e-4
    assert harness.difference(contest.loop(contestants.returned(contest.network, None))(), plain) == 0


def test_the_latent_network_has_the_size_of_stable_diffusion_1(harness):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    import workloads

    with torch.device("meta"):
        network = workloads.LatentUNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 859_520_964


@pytest.mark.parametrize("name", ["tiny-labels", "tiny-latent"])
def test_networks_with_labels_or_without_a_bottleneck_take_part(harness, name):
    if name == "tiny-latent":
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    import contestants
    import workloads

    contest = contestants.Contest(workloads.WORKLOADS[name], 2, torch.device("cpu"))
    assert harness.difference(contest.engine()(), contest.published()()) < 1e-4


def test_dpm_solver_of_the_other_libraries_is_the_expected_one(harness):
    import contestants
    import workloads

    contest, drawn = contestants.Contest(workloads.WORKLOADS["tiny-labels"], 2, torch.device("cpu")), 0
    for draw in (contest.diffusers, contest.k_diffusion):
        try:
            images = draw()()
        except harness.Unavailable:
            continue
        assert harness.difference(images, contest.multistep()) < 1e-3
        drawn += 1
    if not drawn:
        pytest.skip("neither diffusers nor k-diffusion is installed")


@pytest.fixture
def integrations(harness):
    import bench_integrations

    return bench_integrations


def test_every_route_is_measured_beside_the_engine_and_tabulated(integrations, tmp_path, capsys):
    """What needs no compiler and no other process; the tiny network stands for the bundled one."""
    file, names = tmp_path / "new" / "routes.json", "arrays,stepper,k-diffusion,comfyui"
    arguments = ["--out", str(file), "--model", "tiny", "--batch", "1", "--rounds", "5", "--routes", names]
    assert integrations.main(arguments) == 0
    data = json.loads(file.read_text())
    assert (data["model"], data["batch"], data["environment"]["torch"]) == ("tiny", 1, torch.__version__)
    assert [row["route"].lower().partition(" ")[0].strip(",") for row in data["routes"]] == names.split(",")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(data["routes"])
    for row, line in zip(data["routes"], printed[2:], strict=True):
        assert row["difference"] <= row["tolerance"]
        assert row["wall_ms"]["median"] > 0
        assert row["sampler_run_ms"]["median"] > 0
        assert line.startswith(f"| [{row['route']}]({row['docs']}) | {row['needs']} | {row['lines']} |")
    assert {row["group"]: row["sampler_run_ms"] for row in data["routes"]}.keys() >= {"per_sample", "multistep"}


def test_the_routes_are_those_of_the_documentation(integrations):
    """Every page about embedding has its route, every route its page, and its code is found."""
    docs = BENCHMARKS.parent / "docs"
    pages = {f"integrations/{page.name}" for page in (docs / "integrations").glob("*.md")}
    assert {route.docs for route in integrations.ROUTES} == pages | {"export.md", "c-api.md", "cupy.md", "arrays.md"}
    for route in integrations.ROUTES:
        assert (docs / route.docs).is_file()
        assert route.lines > 10, route.name
        assert all(list(BENCHMARKS.parent.glob(pattern)) for pattern in route.files), route.name


@pytest.mark.parametrize("file", ["integrations-cpu.json", "integrations-servers-cpu.json"])
def test_the_documentation_shows_the_routes_as_measured(integrations, file):
    measured = json.loads((BENCHMARKS / "results" / file).read_text("utf-8"))["routes"]
    assert integrations.table(measured) in (BENCHMARKS.parent / "docs" / "results.md").read_text("utf-8")


def test_a_route_that_cannot_run_says_why_in_the_table(integrations, harness):
    def missing(bench, stack):
        raise harness.Unavailable("not installed")

    from routes import Bench, Route

    route = Route("a", "a.md", "b", ("README.md",), "per_sample", missing)
    wrong = Route("c", "a.md", "b", (), "per_sample", lambda bench, stack: lambda: 1.01 * bench.per_sample()())
    rows = integrations.measure_group(Bench("tiny", 1), "per_sample", [route, wrong], rounds=5)
    assert "not measured: not installed" in integrations.table(rows)
    assert "not measured: wrong result: off by 1.0e-02" in integrations.table(rows)


def test_lines_of_code_are_those_that_do_something(integrations):
    from routes import code_lines

    function = 'def f(x):\n    """Doc."""\n    return """two\nlines""" + x(\n        os)\n'
    python = '"""A\npage.\n"""\n\nimport os  # why\n\n# a comment\n' + function
    assert code_lines(python, ".py") == 5
    assert code_lines("/* a\n b */\n#include <x>\n\n// no\nint f(void) { /* no */\n    return 1; }\n", ".c") == 3
