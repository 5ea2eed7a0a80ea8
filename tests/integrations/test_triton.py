"""A model repository for Triton's Python backend, under a stand-in for it."""

import importlib.util
import json
import re
import sys
import time
from concurrent.futures import Future
from types import ModuleType, SimpleNamespace

import hosts
import pytest
import torch
from onnx_graphs import network

from amed_engine import AmedError, Sampler, save_predictor
from amed_engine.integrations.serving.hosted import Hosted
from amed_engine.integrations.serving.triton import write_repository
from amed_engine.zoo import bundled_predictor


@pytest.fixture(scope="module")
def images():
    return hosts.expected()


def columns(seeds, class_labels=None, **_):
    """The tensors of a request, by name."""
    given = class_labels if isinstance(class_labels, list) else [class_labels] * len(seeds)
    named = {"SEEDS": seeds} | ({} if class_labels is None else {"CLASS_LABELS": given})
    return {name: [[value] for value in values] for name, values in named.items()}


def parameters(seeds, class_labels=None, **options):
    """The parameters of a request; Triton keeps "priority" for itself."""
    return {"amed_priority" if name == "priority" else name: value for name, value in options.items()}


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
    INVALID_ARG, INTERNAL, UNAVAILABLE = "invalid argument", "internal", "unavailable"

    def __init__(self, message, code):
        super().__init__(message=message, code=code)


class Request:
    """Whose tensors last no longer than `execute`; what its sender sent is the result of `answer`."""

    def __init__(self, tensors, parameters=None):
        self.tensors = {name: Tensor(name, rows) for name, rows in tensors.items()}
        self.said, self.answer = json.dumps(parameters or {}), Future()

    def parameters(self):
        return self.said

    def get_response_sender(self):
        return SimpleNamespace(send=self.send)

    def send(self, response, flags):
        assert flags == "final"
        self.answer.set_result(response)


def execute(model, *requests):
    """The responses, after a call as the backend makes it."""
    assert model.execute(requests) is None
    for request in requests:
        request.tensors.clear()
    return [request.answer.result(60) for request in requests]


@pytest.fixture
def backend(monkeypatch):
    """What of `triton_python_backend_utils` a model uses."""
    utils = ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.TritonError = Tensor, Error
    utils.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(tensors=output_tensors, error=error)
    utils.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
    utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = "final"
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


def test_a_repository_serves_the_engine_s_images(model, images):
    requests = [Request(columns(**payload), parameters(**payload)) for payload in hosts.PAYLOADS]
    for i, (response, drawn) in enumerate(zip(execute(model, *requests), images, strict=True)):
        if drawn is None:
            assert hosts.WRONG[i] in response.error.message
            assert response.error.code == Error.INVALID_ARG
        else:
            assert [tensor.name for tensor in response.tensors] == ["IMAGES"]
            assert response.tensors[0].held.dtype == torch.float32
            torch.testing.assert_close(response.tensors[0].held, drawn, rtol=0, atol=2e-5 * float(drawn.abs().max()))
    stats = model.hosted.engine.stats()
    assert stats.evaluations > 2 * stats.ticks


def test_a_long_request_keeps_no_other_waiting(model):
    long = Request(columns(range(8)), {"nfe": 64, "solver": "euler"})
    model.execute([long])
    (short,) = execute(model, Request(columns([1]), {"nfe": 1, "solver": "euler", "amed_priority": 1}))
    assert not short.error
    assert not long.answer.done()


@pytest.mark.parametrize(("shape", "labels"), [(("B",), [[0.5], [40.0]]), (("B", 2), [[0.5, 1.0], [40.0, 0.0]])])
def test_a_model_that_is_told_numbers_takes_them_as_floats(backend, tmp_path, shape, labels):
    inputs = {"x": ("float32", ("B", 1, 4, 4)), "sigma": ("float32", ("B",)), "strength": ("float32", shape)}
    path = network(tmp_path / "net.onnx", inputs, answer="denoised")
    folder = write_repository(tmp_path, model=str(path), nfe=3)
    width = len(labels[0])
    declared = f'"CLASS_LABELS" data_type: TYPE_FP32 dims: [ {width} ] optional: false'
    assert declared in (folder / "config.pbtxt").read_text()
    model = started(folder)
    seeds = {"SEEDS": [[1], [2]]}
    drawn, refused = execute(model, Request(seeds | {"CLASS_LABELS": labels}), Request(seeds))
    expected = Sampler(str(path), nfe=3).run([1, 2], labels).images
    torch.testing.assert_close(drawn.tensors[0].held, expected, rtol=1e-5, atol=1e-5)
    assert "that the model is told" in refused.error.message


def test_a_sample_that_broke_is_the_server_s_error(model, monkeypatch):
    def broken(x, sigma, **_):
        return torch.full_like(x, torch.nan)

    model.hosted.close()
    model.hosted = Hosted(broken, solver="euler", nfe=3, schedule="polynomial", afs=False, shape=(1, 4, 4))
    (response,) = execute(model, Request(columns([1])))
    assert response.error.code == Error.INTERNAL


@pytest.mark.parametrize(
    ("parameters", "code", "match"),
    [
        ({"steps": 3}, "INVALID_ARG", "unknown parameter 'steps'; known are nfe, .*amed_priority"),
        ({"seeds": 3}, "INVALID_ARG", "unknown parameter 'seeds'"),
        ({"nfe": "3"}, "INVALID_ARG", "nfe must be an integer"),
        ({"amed_priority": 0.5}, "INVALID_ARG", "priority must be an integer"),
        ({"deadline": 1e-9}, "UNAVAILABLE", "deadline"),
    ],
)
def test_parameters_are_checked(model, parameters, code, match):
    (response,) = execute(model, Request(columns([1]), parameters))
    assert response.error.code == getattr(Error, code)
    assert re.search(match, response.error.message)


def test_a_full_queue_is_unavailable(backend, tmp_path):
    model = started(write_repository(tmp_path, model="digits", nfe=5, rows=2, queue=0))
    long = Request(columns([1, 2]), {"nfe": 64, "solver": "euler"})
    model.execute([long])
    while not model.hosted.engine.stats().live:
        time.sleep(0.001)
    (response,) = execute(model, Request(columns([3])))
    assert response.error.code == Error.UNAVAILABLE
    assert "try again in" in response.error.message
    model.finalize()
    assert not long.answer.result(0).error  # what was taken is answered first


def test_the_configuration_says_what_the_model_does(tmp_path):
    text = (write_repository(tmp_path, model="digits", nfe=3, name="five", gpu=True) / "config.pbtxt").read_text()
    assert text.count("{") == text.count("}")
    for line in ('name: "five"', 'backend: "python"', "dims: [ 1, 8, 8 ]", "kind: KIND_GPU", "max_batch_size: 64"):
        assert line in text
    assert "dynamic_batching" not in text  # the engine takes them one by one
    assert r"\"rows\": 64, \"queue\": 1024" in text
    assert {p.name for p in (tmp_path / "five").rglob("*")} == {"1", "model.py", "config.pbtxt"}


def test_paths_are_written_in_full(tmp_path, monkeypatch):
    """The server runs in another folder."""
    monkeypatch.chdir(tmp_path)
    save_predictor(bundled_predictor("digits", nfe=5), "five.safetensors")
    text = (write_repository("models", model="digits", predictor="five.safetensors") / "config.pbtxt").read_text()
    assert json.dumps(str(tmp_path / "five.safetensors"))[1:-1] in text
    assert r"\"model\": \"digits\"" in text
    text = (write_repository("several", model="digits", predictors=["five.safetensors"]) / "config.pbtxt").read_text()
    assert json.dumps(str(tmp_path / "five.safetensors"))[1:-1] in text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": "digit"}, "unknown model"),
        ({"model": "digits", "name": "a b"}, "letters, digits and _"),
        ({"model": "digits", "max_batch_size": 0}, "max_batch_size must be in"),
        ({"model": "digits", "rows": 0}, "rows must be an integer"),
        ({"model": "digits", "queue": -1}, "queue must be an integer"),
        ({"model": "digits", "nfe": 5, "predictor": "nowhere.safetensors"}, "nowhere"),
    ],
)
def test_a_repository_that_cannot_work_is_not_written(tmp_path, options, match):
    with pytest.raises((AmedError, OSError), match=match):
        write_repository(tmp_path, **options)
    assert not list(tmp_path.iterdir())
