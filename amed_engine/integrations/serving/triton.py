"""NVIDIA Triton Inference Server: a model repository for its Python backend, and the model in it.

write_repository("models", model="digits", nfe=5)
tritonserver --model-repository=models
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from amed_engine.checkpoints import atomic_write
from amed_engine.engine.sampler import Sampler
from amed_engine.errors import AmedError, ConfigError
from amed_engine.integrations.serving.batching import MAX_IMAGES, answer
from amed_engine.solvers.targets import check_folder

_MODEL = "from amed_engine.integrations.serving.triton import TritonPythonModel  # noqa: F401\n"

_CONFIG = """name: "{name}"
backend: "python"
max_batch_size: {max_batch_size}
input [
  {{ name: "SEEDS" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "CLASS_LABELS" data_type: {labels} optional: {optional} }}
]
output [ {{ name: "IMAGES" data_type: TYPE_FP32 dims: [ {dims} ] }} ]
dynamic_batching {{ max_queue_delay_microseconds: 10000 }}
instance_group [ {{ count: 1 kind: {kind} }} ]
parameters {{ key: "sampler" value: {{ string_value: {options} }} }}
"""


def write_repository(
    path: str | os.PathLike,
    *,
    model: str,
    predictor: str | None = None,
    nfe: int | None = None,
    name: str = "amed",
    max_batch_size: int = MAX_IMAGES,
    gpu: bool = False,
) -> Path:
    """A model repository at `path` that serves this model; returns its folder `path/name`.

    The model is opened once, on the CPU, to know the shape of its images, and so that what cannot work fails here and not
    in the server. model: a zoo name or a path, predictor: a path; the server must see them by the same. Raises ConfigError.
    """
    if not name.isidentifier():
        raise ConfigError(f"name must be letters, digits and _, got {name!r}")
    if not 1 <= max_batch_size <= MAX_IMAGES:
        raise ConfigError(f"max_batch_size must be in 1 .. {MAX_IMAGES}, got {max_batch_size}")
    options = {"model": str(model), "predictor": predictor and os.path.abspath(predictor), "nfe": nfe}
    opened = Sampler(**options, device="cpu").model  # type: ignore[arg-type]
    # The server runs in another folder.
    options["model"] = options["model"] if opened.name else os.path.abspath(model)
    if opened.shape is None:
        raise ConfigError("the model does not say what shape its images have; save it with its configuration")
    config = _CONFIG.format(
        name=name,
        max_batch_size=max_batch_size,
        labels=f"TYPE_FP32 dims: [ {opened.label_dim} ]" if opened.continuous else "TYPE_INT64 dims: [ 1 ]",
        optional="false" if opened.continuous else "true",
        dims=", ".join(map(str, opened.shape)),
        kind="KIND_GPU" if gpu else "KIND_CPU",
        options=json.dumps(json.dumps(options)),
    )
    folder = Path(path, name)
    check_folder(folder / "1", "model.py", "../config.pbtxt")
    for file, text in ((folder / "1" / "model.py", _MODEL), (folder / "config.pbtxt", config)):
        atomic_write(file, text.encode())
    return folder


class TritonPythonModel:
    """What Triton's Python backend calls. All requests of one `execute` are one batch of the engine.

    Tensors pass by DLPack: a backend that was built for NumPy 1 misreads the strides and sizes of arrays of NumPy 2, and
    hands every row of a request its first seed.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model on the device of this instance."""
        parameters = json.loads(args["model_config"])["parameters"]
        gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
        self.sampler = Sampler(**json.loads(parameters["sampler"]["string_value"]), device=device)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in their order."""
        import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

        rows = self.sampler.model.continuous and self.sampler.model.label_dim > 1

        def column(request: Any, name: str, rows: bool = False) -> list | None:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            values = None if tensor is None else torch.from_dlpack(tensor)
            return None if values is None else (values if rows else values.reshape(-1)).tolist()

        payloads = [{"seeds": column(r, "SEEDS"), "class_labels": column(r, "CLASS_LABELS", rows)} for r in requests]
        return [self._response(pb_utils, drawn) for drawn in answer(self.sampler, payloads)]

    def _response(self, pb_utils: Any, drawn: Any) -> Any:
        if isinstance(drawn, AmedError):
            code = pb_utils.TritonError.INVALID_ARG if isinstance(drawn, ConfigError) else pb_utils.TritonError.INTERNAL
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(drawn), code))
        images = pb_utils.Tensor.from_dlpack("IMAGES", drawn.float().cpu().contiguous())
        return pb_utils.InferenceResponse(output_tensors=[images])

    def finalize(self) -> None:
        """Let go of the model and its graphs."""
        del self.sampler
