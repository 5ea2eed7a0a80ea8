"""NVIDIA Triton Inference Server: a model repository for its Python backend, and the model in it.

write_repository("models", model="digits", nfe=5)
tritonserver --model-repository=models
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from amed_engine.checkpoints import atomic_write
from amed_engine.engine.request import shape_of
from amed_engine.engine.result import SampleResult
from amed_engine.errors import ConfigError
from amed_engine.integrations.serving.hosted import Hosted
from amed_engine.integrations.serving.requests import MAX_IMAGES, OPTIONS
from amed_engine.serving.statuses import status_of
from amed_engine.solvers.targets import check_folder

logger = logging.getLogger("amed_engine")

PRIORITY = "amed_priority"  # "priority" is a parameter of Triton's own, which no model sees
_MODEL = "from amed_engine.integrations.serving.triton import TritonPythonModel  # noqa: F401\n"

_CONFIG = """name: "{name}"
backend: "python"
max_batch_size: {max_batch_size}
input [
  {{ name: "SEEDS" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "CLASS_LABELS" data_type: {labels} optional: {optional} }}
]
output [ {{ name: "IMAGES" data_type: TYPE_FP32 dims: [ {dims} ] }} ]
instance_group [ {{ count: 1 kind: {kind} }} ]
parameters {{ key: "sampler" value: {{ string_value: {options} }} }}
"""


def write_repository(
    path: str | os.PathLike,
    *,
    model: str,
    predictor: str | None = None,
    predictors: Sequence[str] = (),
    nfe: int | None = None,
    name: str = "amed",
    max_batch_size: int = MAX_IMAGES,
    gpu: bool = False,
    rows: int = 64,
    queue: int = 1024,
) -> Path:
    """A model repository at `path` that serves this model; returns its folder `path/name`.

    The model is opened once, on the CPU, to know the shape of its images, and so that what cannot work fails here and not
    in the server. model: a zoo name or a path, predictor: a path, predictors: paths, one for each NFE, as of
    `ContinuousSampler`; the server must see them by the same. nfe: of requests that name none. max_batch_size: images of one
    request; rows: images at once, of any requests; queue: images that may wait. Raises ConfigError.
    """
    if not name.isidentifier():
        raise ConfigError(f"name must be letters, digits and _, got {name!r}")
    if not 1 <= max_batch_size <= MAX_IMAGES:
        raise ConfigError(f"max_batch_size must be in 1 .. {MAX_IMAGES}, got {max_batch_size}")
    options = {"model": str(model), "predictor": predictor and os.path.abspath(predictor), "nfe": nfe}
    options |= {"predictors": [os.path.abspath(file) for file in predictors], "rows": rows, "queue": queue}
    hosted = Hosted(**options, device="cpu")
    hosted.close()
    opened = hosted.engine.model
    # The server runs in another folder.
    options["model"] = options["model"] if opened.name else os.path.abspath(model)
    config = _CONFIG.format(
        name=name,
        max_batch_size=max_batch_size,
        labels=f"TYPE_FP32 dims: [ {opened.label_dim} ]" if opened.continuous else "TYPE_INT64 dims: [ 1 ]",
        optional="false" if opened.continuous else "true",
        dims=", ".join(map(str, shape_of(opened))),
        kind="KIND_GPU" if gpu else "KIND_CPU",
        options=json.dumps(json.dumps(options)),
    )
    folder = Path(path, name)
    check_folder(folder / "1", "model.py", "../config.pbtxt")
    for file, text in ((folder / "1" / "model.py", _MODEL), (folder / "config.pbtxt", config)):
        atomic_write(file, text.encode())
    return folder


class TritonPythonModel:
    """What Triton's Python backend calls. Requests go into one engine as they come, and each is answered once it is done.

    Tensors pass by DLPack: a backend that was built for NumPy 1 misreads the strides and sizes of arrays of NumPy 2, and
    hands every row of a request its first seed.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model on the device of this instance."""
        self.utils = import_module("triton_python_backend_utils")
        parameters = json.loads(args["model_config"])["parameters"]
        gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
        self.hosted = Hosted(**json.loads(parameters["sampler"]["string_value"]), device=device)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take the requests and return, so that the next ones can come; their senders answer later, in whatever order."""
        for request in requests:
            # A request's tensors are gone once this returns, its sender is not.
            read = self._tensors(request), json.loads(request.parameters() or "{}")
            self.hosted.later(self._take, *read, request.get_response_sender())

    def finalize(self) -> None:
        """Answer what was taken, and let go of the model and its graphs."""
        self.hosted.close()
        del self.hosted

    def _tensors(self, request: Any) -> dict[str, list | None]:
        model = self.hosted.engine.model
        rows = model.continuous and model.label_dim > 1
        return {"seeds": self._column(request, "SEEDS"), "class_labels": self._column(request, "CLASS_LABELS", rows)}

    def _column(self, request: Any, name: str, rows: bool = False) -> list | None:
        tensor = self.utils.get_input_tensor_by_name(request, name)
        values = None if tensor is None else torch.from_dlpack(tensor)
        return None if values is None else (values if rows else values.reshape(-1)).tolist()

    def _take(self, tensors: dict[str, Any], parameters: dict[str, Any], sender: Any) -> None:
        try:
            future = self.hosted.submit({**_options(parameters), **tensors})
        except Exception as error:
            self._send(sender, self._failure(error))
        else:
            future.add_done_callback(lambda done: self.hosted.later(self._answer, sender, done))

    def _answer(self, sender: Any, done: Future[SampleResult]) -> None:
        try:
            drawn = done.result().images.float().cpu().contiguous()
            images = self.utils.Tensor.from_dlpack("IMAGES", drawn)
        except Exception as error:
            self._send(sender, self._failure(error))
        else:
            self._send(sender, self.utils.InferenceResponse(output_tensors=[images]))

    def _failure(self, error: Exception) -> Any:
        codes = self.utils.TritonError
        known = {422: codes.INVALID_ARG, **dict.fromkeys((429, 503, 504), codes.UNAVAILABLE)}
        code = known.get(status_of(error), codes.INTERNAL)
        return self.utils.InferenceResponse(output_tensors=[], error=codes(str(error), code))

    def _send(self, sender: Any, response: Any) -> None:
        try:
            sender.send(response, flags=self.utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception:  # nobody waits for what this thread raises
            logger.exception("a response could not be sent")


def _options(parameters: dict[str, Any]) -> dict[str, Any]:
    """A request's parameters as it says them elsewhere. Raises ConfigError."""
    names = {PRIORITY if name == "priority" else name: name for name in OPTIONS}
    if unknown := sorted(parameters.keys() - names):
        raise ConfigError(f"unknown parameter {unknown[0][:40]!r}; known are {', '.join(names)}")
    return {names[name]: value for name, value in parameters.items()}
