"""examples/: short, and doing what they say."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: object, folder: Path) -> str:
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_five_of_at_most_forty_lines():
    lengths = {path.stem: len(path.read_text("utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(lengths) == {"sample", "fit", "wrap", "export", "serve"}
    assert max(lengths.values()) <= 40


def test_sample_draws_a_picture(tmp_path):
    assert "NFE 5" in run("sample", "digits.png", folder=tmp_path)
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size == (16 * 64, 64)
        assert picture.getextrema() == (0, 255)  # ink and paper


def test_fit_comes_nearer_than_the_solver_it_started_from(tmp_path):
    out = run("fit", "predictor.safetensors", folder=tmp_path)
    errors = {name: float(value) for name, value in re.findall(r"^(\w+): RMSE (\S+)", out, flags=re.MULTILINE)}
    assert errors["fitted"] < errors["ipndm"] / 5


def test_wrap_says_what_it_takes_the_network_for(tmp_path):
    out = run("wrap", folder=tmp_path)
    assert "predicts    the noise" in out
    assert "(4, 3, 16, 16)" in out


def test_export_draws_the_same_elsewhere(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = run("export", "loop.onnx", folder=tmp_path)
    assert float(out.rsplit(maxsplit=1)[-1]) < 1e-4


def test_serve_answers_with_images_and_ends_at_sigterm(tmp_path):
    pytest.importorskip("litserve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    body = json.dumps({"seeds": [0, 1], "class_labels": 3}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "application/json"}, method="POST"
    )
    command = [sys.executable, EXAMPLES / "serve.py", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        answer = first_answer(server, request, tmp_path / "log")
        server.terminate()
        assert server.wait(60) == 0, (tmp_path / "log").read_text()
        until = time.monotonic() + 60
        while members(server.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert members(server.pid) == []  # none of its workers is left
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert [base64.b64decode(image)[1:4] for image in answer["images"]] == [b"PNG", b"PNG"]


def members(group: int) -> list[str]:
    """The processes of a group that run still."""
    found = [stat.read_text().rpartition(")")[2].split() for stat in Path("/proc").glob("[0-9]*/stat")]
    return [state for state, _, own, *_ in found if int(own) == group and state != "Z"]


def first_answer(server: subprocess.Popen, request: urllib.request.Request, log: Path) -> dict:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            pytest.fail(error.read().decode())
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no answer after minutes; the server said: {log.read_text()}")
