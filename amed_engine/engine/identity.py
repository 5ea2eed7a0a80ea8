"""What decides the bytes of a sample, in a few JSON-able words: fingerprints, hashes, settings of torch."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import amed_engine.kernels as kernels
from amed_engine.adapters.compiled import Compiled
from amed_engine.adapters.conditions import Conditions
from amed_engine.adapters.fingerprint import digest
from amed_engine.sampling.modules import is_lazy, placed, plain_name
from amed_engine.sampling.predictors import Predictor

ATTENTIONS = ("flash", "mem_efficient", "cudnn", "math")
MAX_TEXT, MAX_ENTRIES = 256, 100  # of what is told in full


def small(value: Any) -> Any:
    """JSON of bounded size: long texts and lists by their SHA-256, as "sha256:...", tensors too; keys as texts."""
    if isinstance(value, Tensor):
        return f"sha256:{digest({'': value})}"
    if isinstance(value, dict):
        return {str(key): small(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [small(entry) for entry in value]
        return hashed(entries) if len(entries) > MAX_ENTRIES else entries
    return hashed(value) if isinstance(value, str) and len(value) > MAX_TEXT else value


def plain(value: Any) -> Any:
    """A configuration as JSON-able data: arrays as lists, what else it holds by the name of its type."""
    told = {np.ndarray: lambda v: v.tolist(), Tensor: small}
    return json.loads(json.dumps(value, default=lambda v: told.get(type(v), lambda v: type(v).__qualname__)(v)))


def hashed(value: Any) -> str:
    """SHA-256 of JSON-able data, "sha256:..."."""
    return f"sha256:{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}"


def predictor_hash(predictor: Predictor | None) -> str | None:
    """Of its kind, its arguments and its tensors."""
    if predictor is None:
        return None
    return hashed([type(predictor).__name__, predictor.config, digest(predictor.state_dict())])


def buffers_hash(module: nn.Module | None) -> str | None:
    """Of what a network computes with beside its parameters: statistics, tables, the conditions that are bound to it.

    What it does not save is left out, as caches that fill while it runs; None without any.
    """
    found = {} if module is None else dict(_buffers(module))
    return digest(found) if found else None


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, part, whole in placed(module):
        for name, layer in part.named_modules() if whole else [("", part)]:
            passing = () if isinstance(layer, Conditions) else getattr(layer, "_non_persistent_buffers_set", ())
            for own, buffer in layer.named_buffers(recurse=False):
                if own not in passing and not is_lazy(buffer) and buffer.device.type != "meta":
                    yield prefix + plain_name(part, f"{name}.{own}".lstrip(".")), buffer


def file_hashes(module: nn.Module | None) -> list[str]:
    """SHA-256 of the files of compiled and ONNX models in a network, whose weights are there alone."""
    parts = [] if module is None else [part for part in module.modules() if isinstance(part, Compiled)]
    return [part.loaded.sha256() for part in parts if part.loaded is not None]


def arithmetic(device: torch.device) -> dict[str, Any]:
    """Settings of torch and the kernels in use, which decide how numbers are rounded."""
    backends: Any = torch.backends
    told = {"kernels": kernels.backends().get(device.type, "reference")}
    own = (backends.cuda, backends.cudnn) if device.type == "cuda" else (backends.mkldnn, backends.mkldnn)
    precisions = own[0].matmul.fp32_precision, own[1].conv.fp32_precision
    # "none" leaves it at float32.
    matmul, convolution = ("ieee" if precision == "none" else precision for precision in precisions)
    algorithms = {
        "deterministic": torch.are_deterministic_algorithms_enabled() or backends.cudnn.deterministic,
        "benchmark": backends.cudnn.benchmark,
        "attention": [getattr(backends.cuda, f"{kind}_sdp_enabled")() for kind in ATTENTIONS],
    }
    return {**told, "matmul": matmul, "convolution": convolution, "algorithms": algorithms}


def device_name(device: torch.device) -> str:
    """ "cpu: " or "cuda: " and the name of the processor, on which the last bits depend."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"{device.type}: {processor()}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
