"""NVIDIA Triton Inference Server itself, out of the wheel nvidia-pytriton, on a repository as it is written."""

import json
import re
import sysconfig
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hosts import PAYLOADS, ROWS, WRONG, expected, live_rows, unused_port

from amed_engine import AmedError, ConfigError
from amed_engine.errors import MissingDependency
from amed_engine.integrations.serving import tritonserver
from amed_engine.integrations.serving.triton import write_repository

# The model as it is written, which says at its end what its engine did.
TOLD = """
import json
from dataclasses import asdict
from amed_engine.integrations.serving import triton

class TritonPythonModel(triton.TritonPythonModel):
    def finalize(self):
        engine = self.hosted.engine
        super().finalize()
        print("STATS", json.dumps(asdict(engine.stats())), flush=True)
"""


def serving(folder, **options):
    """A server that holds digits, its log in folder / "log"."""
    model = write_repository(folder / "models", model="digits", nfe=5, **options) / "1" / "model.py"
    model.write_text(TOLD)
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("wb") as log:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            with tritonserver.serving(folder / "models", unused_port(), log) as address:
                yield address
        except MissingDependency as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    yield from serving(tmp_path_factory.mktemp("server"))


def tensor(name, rows):
    return {"name": name, "datatype": "INT64", "shape": list(np.shape(rows)), "data": rows}


def request(seeds, class_labels=None, **options):
    """In JSON; Triton keeps "priority" for itself."""
    inputs = [tensor("SEEDS", [[seed] for seed in seeds])]
    if class_labels is not None:
        given = class_labels if isinstance(class_labels, list) else [class_labels] * len(seeds)
        inputs.append(tensor("CLASS_LABELS", [[label] for label in given]))
    options = {"amed_priority" if name == "priority" else name: value for name, value in options.items()}
    return {"inputs": inputs, "parameters": options}


def ask(address, body):
    """(status, the images or the error) of one request."""
    sent = urllib.request.Request(f"{address}/v2/models/amed/infer", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(sent, timeout=120) as got:
            (output,) = json.load(got)["outputs"]
            assert (output["name"], output["datatype"]) == ("IMAGES", "FP32")
            return got.status, np.array(output["data"], np.float32).reshape(output["shape"])
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def ask_all(address, bodies, clients):
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda body: ask(address, body), bodies))


def test_the_server_answers_requests_of_every_kind_at_once(address):
    answers, images = ask_all(address, [request(**payload) for payload in PAYLOADS] * 3, 24), expected() * 3
    for i, ((status, answer), drawn) in enumerate(zip(answers, images, strict=True)):
        assert status == (400 if drawn is None else 200)
        if drawn is None:
            assert WRONG[i % len(PAYLOADS)] in answer
        else:
            np.testing.assert_allclose(answer, drawn, rtol=0, atol=2e-5 * float(drawn.abs().max()))


def test_requests_of_many_programs_fill_the_rows_and_are_answered_before_the_end(tmp_path):
    bodies = [request([i], nfe=(16, 24, 32)[i % 3], solver=("euler", "ipndm")[i % 2]) for i in range(96)]
    for address in serving(tmp_path, rows=ROWS, queue=0):
        statuses = {status for status, _ in ask_all(address, bodies, ROWS)}
        status, message = ask(address, request(range(ROWS + 1)))
        assert (status, "split the request" in message) == (400, True)
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(ask, address, request(range(ROWS), nfe=64, solver="euler"))
            while ask(address, request([1], nfe=1, solver="euler"))[0] != 503:  # no row is free
                assert not last.done()
    assert statuses == {200}
    assert last.result()[0] == 200
    (told,) = re.findall("^STATS (.*)$", (tmp_path / "log").read_text(), re.MULTILINE)
    assert live_rows({"evaluations": 0, "ticks": 0}, json.loads(told)) > ROWS / 2


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ([tensor("SEEDS", [[-1]])], "outside 0"),
        ([tensor("SEEDS", [[1, 2]])], r"Expected \[-1,1\]"),
        ([tensor("SEEDS", [[0]] * 65)], "batch-size must be <= 64"),
        ([tensor("CLASS_LABELS", [[1]])], "seeds must be a list"),
        ([tensor("SEEDS", [[1], [2]]), tensor("CLASS_LABELS", [[3]])], "batch size does not match"),
        ([{**tensor("SEEDS", [[1]]), "datatype": "FP32"}], "expects 'INT64'"),
    ],
)
def test_the_server_refuses_a_bad_request(address, inputs, match):
    status, message = ask(address, {"inputs": inputs})
    assert status == 400
    assert re.search(match, message)


@pytest.mark.parametrize(
    ("parameters", "status", "match"),
    [
        ({"steps": 3}, 400, "unknown parameter 'steps'"),
        ({"nfe": "3"}, 400, "nfe must be an integer"),
        ({"guidance_scale": True}, 400, "guidance_scale must be a number"),
        ({"deadline": 1e-6}, 503, "deadline"),
    ],
)
def test_the_server_refuses_a_bad_parameter(address, parameters, status, match):
    got, message = ask(address, request([1], **parameters))
    assert (got, match in message) == (status, True)


def test_a_server_that_cannot_serve_says_so(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"), tritonserver.serving(tmp_path / "none", unused_port()):
        pass
    folder = write_repository(tmp_path, model="digits")
    config = (folder / "config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(config.replace("digits", "gone"))
    with (
        (tmp_path / "log").open("wb") as log,
        pytest.raises(AmedError) as caught,
        tritonserver.serving(tmp_path, unused_port(), log),
    ):
        pass
    if isinstance(caught.value, MissingDependency):
        pytest.skip(str(caught.value))
    assert "ended with status" in str(caught.value)
    assert "unknown model 'gone'" in (tmp_path / "log").read_text()


def test_a_missing_server_is_named_with_its_install_line(monkeypatch, tmp_path):
    monkeypatch.setattr(tritonserver, "find_spec", lambda name: None)
    with (
        pytest.raises(MissingDependency, match="pip install --no-deps nvidia-pytriton"),
        tritonserver.serving(tmp_path, unused_port()),
    ):
        pass


def test_a_python_without_its_library_cannot_be_embedded(monkeypatch, tmp_path):
    monkeypatch.setattr(tritonserver, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=["x"]))
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: 0)
    with pytest.raises(MissingDependency, match="shared library"), tritonserver.serving(tmp_path, unused_port()):
        pass
