"""ONNX models as denoisers or raw networks, through onnxruntime on the CPU (extra `onnx`)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.compiled import Compiled
from amed_engine.adapters.exporting import FACTS, check_no_loop, read_facts
from amed_engine.adapters.signature import UNBOUNDED, Input, Signature
from amed_engine.errors import ConfigError, FileFormatError, require

TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


class OnnxModel(Compiled):
    """(x, sigma[, labels]) -> (D[, bottleneck]) by an onnxruntime session; the model's first inputs and outputs, in order.

    For a raw network, sigma is whatever time it is told: put `wrap` round it.
    """

    @property
    def returns_bottleneck(self) -> bool:
        return len(self.call.outputs) > 1


class OnnxSession:
    """A model on the CPU: tensors in the order of its inputs -> its first two outputs, or its only one.

    inputs: name, type and shape of each. metadata: the file's custom texts by name. threads: of one call, None for
    onnxruntime's own choice. Raises MissingDependency without onnxruntime, FileFormatError for a file that it does not open.
    """

    def __init__(self, path: str | os.PathLike, threads: int | None = None):
        runtime = require("onnxruntime", "onnx", "ONNX")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common class of its errors
            reason = str(error).splitlines()[0]
            raise FileFormatError(f"{path} cannot be loaded: it is damaged, or no ONNX model: {reason}") from error
        self.inputs = self._session.get_inputs()
        self.outputs = [entry.name for entry in self._session.get_outputs()][:2]
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        feed = {entry.name: tensor.detach().numpy() for entry, tensor in zip(self.inputs, tensors, strict=True)}
        return tuple(torch.from_numpy(array) for array in self._session.run(self.outputs, feed))


def load_onnx(path: str | os.PathLike, *, threads: int | None = None) -> OnnxModel:
    """An ONNX model as a denoiser; its custom metadata sigma_min and sigma_max, if any, are its range of noise levels.

    threads: of one evaluation, None for onnxruntime's own choice. Raises ConfigError without onnxruntime or for inputs that
    are not x (B, C, H, W), sigma (B,) and perhaps labels (B, K), FileFormatError for a file that is no ONNX model.
    """
    session = OnnxSession(path, threads)
    check_no_loop(session.metadata, path)
    signature = _signature(session, path)
    return OnnxModel(session, signature, facts=read_facts(session.metadata.get(FACTS), signature, path))


def _signature(session: OnnxSession, path: str | os.PathLike) -> Signature:
    entries, metadata = session.inputs, session.metadata
    if len(entries) not in (2, 3) or any(e.type not in TYPES or not e.shape for e in entries):
        raise ConfigError(
            f"{path} has inputs {[(e.name, e.type, e.shape) for e in entries]}; expected x (B, C, H, W), sigma (B,) and "
            "perhaps labels (B, K)"
        )
    inputs = tuple(Input(TYPES[e.type], tuple(map(_static, e.shape[1:]))) for e in entries)
    fixed = _static(entries[0].shape[0])
    batch = (1, UNBOUNDED) if fixed is None else (fixed, fixed)
    return Signature(inputs, batch, "cpu", _level(metadata, "sigma_min", path), _level(metadata, "sigma_max", path))


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) and size > 0 else None


def _level(metadata: dict[str, str], name: str, path: str | os.PathLike) -> float | None:
    if name not in metadata:
        return None
    try:
        value = float(metadata[name])
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise FileFormatError(f"{path}: its metadata say {name}={metadata[name]!r}, expected a positive number")
    return value
