"""`amed serve`: what it says and refuses, and how it ends; what it answers is tested in tests/serving."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
import torch

import amed_engine
from amed_engine.cli.commands import serve as command

pytest.importorskip("fastapi", reason="fastapi is not installed")

from amed_engine.serving.http import Limits


@pytest.fixture
def running():
    """(options) -> the process, and where it serves."""
    processes = []

    def run(*options):
        line = [sys.executable, "-P", "-m", "amed_engine", "serve", "--port", "0", "--threads", "1", *options]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        said = process.stdout.readline()
        found = re.fullmatch(r"serving (.+) on (http://127\.0\.0\.1:\d+)\n", said)
        assert found, said + process.stderr.read()
        return process, *found.groups()

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def opened(url, body):
    request = urllib.request.Request(
        f"{url}/v1/samples", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=60)


def test_sigterm_finishes_what_is_asked_for(running):
    process, names, url = running("--rows", "1", "--model", "small=digits")
    assert names == "small"
    stream = opened(url, {"model": "small", "n": 6, "nfe": 12, "predictor": "none", "stream": True})
    assert stream.readline() == b"event: sample\n"
    process.send_signal(signal.SIGTERM)
    rest = stream.read().decode()
    assert rest.count("event: sample\n") == 5
    assert "event: done\n" in rest
    assert process.wait(60) == 0
    assert process.stdout.read() + process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "--port"),
        (["--rows", "0"], "--rows"),
        (["--buckets", "1,x"], "'1,x' is no list of numbers; write e.g. 1,2,4,8"),
        (["--model", "=digits"], "'=digits' is no model"),
        (["--model", "digits", "--model", "digits"], "'digits' is named twice"),
        (["--device", "cpu", "--device", "cpu"], "a device is named twice"),
        (["--rows", "2", "--queue", "4", "--max-samples", "7"], "--max-samples 7 is more than the 6 that --rows and"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--backend", "graph", "--device", "cpu"], "backend='graph' needs a CUDA device"),
        (
            ["--model", "digits", "--model", "a=digits", "--predictor", "5.st"],
            "whose? write NAME=FILE; served are digits, a",
        ),
        (["--predictor", "faces=5.st"], "no model 'faces'; served are digits"),
        (
            ["--weights", "a.pkl", "--weights", "digits=b"],
            "--weights of digits are named twice: a.pkl, b; leave one of",
        ),
        (["--weights", "a.pkl"], "digits is bundled and has its weights"),
        (["--grace", "-1"], "--grace"),
        (["--grace", "nan"], "--grace"),
        (["--grace", "inf"], "--grace"),
        (["--host", "nowhere.invalid"], "nowhere.invalid"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused_before_it_serves(amed, arguments, says):
    code, printed, errors = amed("serve", "--port", "0", *arguments)
    assert (code, printed) == (2, ""), errors
    assert says in errors


def test_an_address_that_is_taken_is_named(amed):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, errors = amed("serve", "--port", port)
    assert (code, errors) == (1, f"amed: error: Address already in use: 127.0.0.1:{port}\n")


def test_models_are_served_by_the_names_they_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    named = command.parse_models(None, None, ("digits", "faces=/models/ffhq", "a=b", "x=y=z"))
    assert named == {"digits": "digits", "faces": "/models/ffhq", "a=b": "a=b", "x": "y=z"}


def test_predictors_belong_to_the_models_they_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").touch()
    assert command.files_of(["mine"], "--predictor", ["3.st", "mine=5.st", "a=b"]) == {"mine": ["3.st", "5.st", "a=b"]}
    given = ["a=3.st", "c=5.st", "a=x=y.st", "c=d=e"]
    assert command.files_of(["a", "c", "a=x"], "--predictor", given) == {
        "a": ["3.st"],
        "c": ["5.st", "d=e"],
        "a=x": ["y.st"],
    }


def test_a_copy_by_path_is_served_with_the_predictors_it_is_given(running, tmp_path):
    amed_engine.checkpoints.save_model(amed_engine.zoo.load("digits"), tmp_path / "copy.safetensors")
    for nfe in (3, 5):
        amed_engine.save_predictor(amed_engine.zoo.bundled_predictor("digits", nfe), tmp_path / f"{nfe}.safetensors")
    models = ["--model", f"mine={tmp_path / 'copy.safetensors'}", "--model", "digits"]
    given = [f"--predictor=mine={tmp_path / f'{nfe}.safetensors'}" for nfe in (5, 3)]
    _, _, url = running("--rows", "2", *models, *given)
    listed = json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=60))["data"]
    assert {each["id"]: each["predictors"] for each in listed} == {"mine": [3, 5], "digits": list(range(3, 11))}
    for nfe in (3, 5):
        answers = [json.load(opened(url, {"model": name, "seeds": [1], "nfe": nfe})) for name in ("mine", "digits")]
        assert answers[0]["plan"] == answers[1]["plan"]
        assert "+ predictor" in answers[0]["plan"]


def test_a_published_model_is_served_with_the_weights_it_is_given(amed, publish, small, tmp_path, monkeypatch):
    from amed_engine.serving.http import run

    drawn = []

    class Server(run.Server):  # the published sizes are small ones in this process alone
        def run(self, sockets):
            (engine,) = self._app.state.service.engines["mine"]
            drawn.append(engine.submit([1, 2], solver="ipndm", nfe=3).result().images)

    monkeypatch.setattr(run, "Server", Server)
    name = "edm-cifar10-32x32-uncond-vp"
    file = publish.edm(small, tmp_path / f"{name}.pkl")
    models = ["--model", f"mine={name}", "--model", "digits", "--weights", f"mine={file}"]
    assert amed("serve", "--port", "0", "--device", "cpu", *models) == (0, "", "")
    expected = amed_engine.Sampler(small, solver="ipndm", nfe=3, device="cpu").run([1, 2]).images
    assert (drawn[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def made(monkeypatch):
    """What the command makes of its options, and how the server ends is set in `ends`; the running is tested above."""
    from amed_engine.serving.http import run

    class Engine:
        def __init__(self, model, **options):
            made.append((model, options))
            self.device, self.closed = options["device"], False

        def close(self, drain):
            made.append(("closed", drain))

    class Server:
        def __init__(self, app, grace, *, ready, close):
            service, (self.signals, self.unanswered) = app.state.service, ends[-1]
            made.append((grace, service.limits, service.allow_programs))

        def run(self, sockets):
            pass

    made, ends = [], [(1, 0)]
    monkeypatch.setattr(amed_engine, "ContinuousSampler", Engine)
    monkeypatch.setattr(run, "Server", Server)
    return made, ends


def test_options_reach_engines_and_limits(amed, made):
    options = ["--rows", "8", "--queue", "9", "--buckets", "2,8", "--backend", "eager", "--compile", "default"]
    options += ["--autocast", "bfloat16", "--device", "cpu", "--device", "meta", "--allow-programs"]
    options += ["--predictor", "a.st", "--predictor", "digits=b.st", "--weights", "c.pkl"]
    options += ["--max-samples", "5", "--max-body", "77", "--max-nfe", "6", "--grace", "0.5"]
    assert amed("serve", "--port", "0", *options) == (0, "", "")
    asked = {"rows": 8, "queue": 9, "buckets": (2, 8), "backend": "eager", "compile": "default"}
    asked |= {"autocast": torch.bfloat16, "predictors": ["a.st", "b.st"], "weights": "c.pkl"}
    assert made[0] == [
        ("digits", {"device": "cpu", **asked}),
        ("digits", {"device": "meta", **asked}),
        (0.5, Limits(samples=5, body=77, nfe=6), True),
        ("closed", False),
        ("closed", False),
    ]


@pytest.mark.parametrize(
    ("signals", "code", "says"), [(1, 1, "within --grace 30"), (2, 130, "before the second signal")]
)
def test_what_was_not_answered_is_told(amed, made, signals, code, says):
    made[1].append((signals, 3))
    assert amed("serve", "--port", "0") == (code, "", f"amed: error: 3 requests were not answered {says}\n")


def test_a_missing_package_is_named(amed, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("amed_engine.serving.http", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, errors = amed("serve", "--port", "0")
    assert code == 1
    assert "the HTTP server needs uvicorn; pip install 'amed-engine[serve]'" in errors


def test_help_imports_nothing_heavy():
    code = "import sys, amed_engine.cli as c; c.app.commands; sys.exit(any(m in sys.modules for m in ('torch', 'fastapi')))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
