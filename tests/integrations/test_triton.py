"""A model repository for Triton's Python backend: under a stand-in for it, and on the server itself."""

import importlib.util
import json
import re
import socket
import sys
import sysconfig
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from onnx_graphs import network

from amed_engine import AmedError, ConfigError, Sampler, save_predictor
from amed_engine.errors import MissingDependency
from amed_engine.integrations.serving import tritonserver
from amed_engine.integrations.serving.triton import write_repository
from amed_engine.zoo import bundled_predictor

REQUESTS = [([3, 4], [7, 7]), ([5], None), ([6], [11]), ([8, 9], [1, 2])]


@pytest.fixture(scope="module")
def expected():
    """The engine's images of each request; None for class 11 of ten."""
    digits = Sampler("digits", nfe=5)
    return [
        None if classes == [11] else digits.run(seeds, class_labels=classes).images.numpy()
        for seeds, classes in REQUESTS
    ]


class Tensor:
    """As the backend has it, without `as_numpy`: built for NumPy 1, it misreads arrays of NumPy 2."""

    def __init__(self, name, held):
        self.name, self.held = name, torch.as_tensor(held)
        self.__dlpack__, self.__dlpack_device__ = self.held.__dlpack__, self.held.__dlpack_device__

    @staticmethod
    def from_dlpack(name, tensor):
        assert tensor.is_contiguous()
        return Tensor(name, torch.from_dlpack(tensor))


class Error(SimpleNamespace):
    INVALID_ARG, INTERNAL = "invalid argument", "internal"

    def __init__(self, message, code):
        super().__init__(message=message, code=code)


@pytest.fixture
def backend(monkeypatch):
    """What of `triton_python_backend_utils` a model uses."""
    utils = ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.TritonError = Tensor, Error
    utils.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(tensors=output_tensors, error=error)
    utils.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    return utils


@pytest.fixture
def model(backend, tmp_path):
    """Of model.py, loaded from a repository and opened as the Python backend does it."""
    model = started(write_repository(tmp_path, model="digits", nfe=5))
    yield model
    model.finalize()


def started(folder):
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    value = json.loads(re.search(r'string_value: ("(?:[^"\\]|\\.)*")', (folder / "config.pbtxt").read_text())[1])
    config = {"parameters": {"sampler": {"string_value": value}}}
    model = module.TritonPythonModel()
    args = {"model_config": json.dumps(config), "model_instance_kind": "CPU", "model_instance_device_id": "0"}
    model.initialize(args)
    return model


def columns(seeds, classes):
    named = {"SEEDS": seeds} | ({} if classes is None else {"CLASS_LABELS": classes})
    return {name: [[value] for value in values] for name, values in named.items()}


def test_a_repository_serves_the_engine_s_images(model, expected):
    requests = [{name: Tensor(name, rows) for name, rows in columns(*request).items()} for request in REQUESTS]
    for response, images in zip(model.execute(requests), expected, strict=True):
        if images is None:
            assert "0 .. 9" in response.error.message
            assert response.error.code == Error.INVALID_ARG
        else:
            assert [tensor.name for tensor in response.tensors] == ["IMAGES"]
            assert response.tensors[0].held.dtype == torch.float32
            np.testing.assert_allclose(response.tensors[0].held, images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "labels"), [(("B",), [[0.5], [40.0]]), (("B", 2), [[0.5, 1.0], [40.0, 0.0]])])
def test_a_model_that_is_told_numbers_takes_them_as_floats(backend, tmp_path, shape, labels):
    inputs = {"x": ("float32", ("B", 1, 4, 4)), "sigma": ("float32", ("B",)), "strength": ("float32", shape)}
    path = network(tmp_path / "net.onnx", inputs, answer="denoised")
    folder = write_repository(tmp_path, model=str(path), nfe=3)
    width = len(labels[0])
    declared = f'"CLASS_LABELS" data_type: TYPE_FP32 dims: [ {width} ] optional: false'
    assert declared in (folder / "config.pbtxt").read_text()
    model = started(folder)
    asked = {"SEEDS": Tensor("SEEDS", [[1], [2]]), "CLASS_LABELS": Tensor("CLASS_LABELS", labels)}
    drawn, refused = model.execute([asked, {"SEEDS": asked["SEEDS"]}])
    expected = Sampler(str(path), nfe=3).run([1, 2], labels).images
    torch.testing.assert_close(drawn.tensors[0].held, expected, rtol=1e-5, atol=1e-5)
    assert "that the model is told" in refused.error.message


def test_a_sample_that_broke_is_the_server_s_error(model, monkeypatch):
    def broken(x, sigma, **_):
        return torch.full_like(x, torch.nan)

    model.sampler = Sampler(broken, solver="euler", nfe=3, schedule="polynomial", afs=False, shape=(1, 4, 4))
    (response,) = model.execute([{"SEEDS": Tensor("SEEDS", [[1]])}])
    assert response.error.code == Error.INTERNAL


def test_the_configuration_says_what_the_model_does(tmp_path):
    text = (write_repository(tmp_path, model="digits", nfe=3, name="five", gpu=True) / "config.pbtxt").read_text()
    assert text.count("{") == text.count("}")
    for line in ('name: "five"', 'backend: "python"', "dims: [ 1, 8, 8 ]", "kind: KIND_GPU", "max_batch_size: 64"):
        assert line in text
    assert {p.name for p in (tmp_path / "five").rglob("*")} == {"1", "model.py", "config.pbtxt"}


def test_paths_are_written_in_full(tmp_path, monkeypatch):
    """The server runs in another folder."""
    monkeypatch.chdir(tmp_path)
    save_predictor(bundled_predictor("digits", nfe=5), "five.safetensors")
    text = (write_repository("models", model="digits", predictor="five.safetensors") / "config.pbtxt").read_text()
    assert json.dumps(str(tmp_path / "five.safetensors"))[1:-1] in text
    assert r"\"model\": \"digits\"" in text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": "digit"}, "unknown model"),
        ({"model": "digits", "name": "a b"}, "letters, digits and _"),
        ({"model": "digits", "max_batch_size": 0}, "max_batch_size must be in"),
        ({"model": "digits", "nfe": 5, "predictor": "nowhere.safetensors"}, "nowhere"),
    ],
)
def test_a_repository_that_cannot_work_is_not_written(tmp_path, options, match):
    with pytest.raises((AmedError, OSError), match=match):
        write_repository(tmp_path, **options)
    assert not list(tmp_path.iterdir())


# On the server itself


def unused_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a server that holds digits."""
    folder = tmp_path_factory.mktemp("server")
    write_repository(folder / "models", model="digits", nfe=5)
    with (folder / "log").open("wb") as log, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            with tritonserver.serving(folder / "models", unused_port(), log) as address:
                yield address
        except MissingDependency as error:
            pytest.skip(str(error))


def tensor(name, rows):
    return {"name": name, "datatype": "INT64", "shape": list(np.shape(rows)), "data": rows}


def ask(address, inputs):
    """(status, the images or the error) of one request in JSON."""
    body = json.dumps({"inputs": inputs}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{address}/v2/models/amed/infer", body), timeout=60) as got:
            (output,) = json.load(got)["outputs"]
            assert (output["name"], output["datatype"]) == ("IMAGES", "FP32")
            return got.status, np.array(output["data"], np.float32).reshape(output["shape"])
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def test_the_server_answers_concurrent_requests_in_batches(address, expected):
    def counts():
        with urllib.request.urlopen(f"{address}/v2/models/amed/stats", timeout=60) as got:
            (stats,) = json.load(got)["model_stats"]
        return sum(int(batch["compute_infer"]["count"]) for batch in stats["batch_stats"])

    bodies = [[tensor(name, rows) for name, rows in columns(*request).items()] for request in REQUESTS] * 6
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda inputs: ask(address, inputs), bodies))
    for (status, answer), images in zip(answers, expected * 6, strict=True):
        assert status == (400 if images is None else 200)
        if images is None:
            assert "0 .. 9" in answer
        else:
            np.testing.assert_allclose(answer, images, rtol=0, atol=1e-5)
    assert 0 < counts() < len(bodies)


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
    status, message = ask(address, inputs)
    assert status == 400
    assert re.search(match, message)


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
