"""Denoisers compiled ahead of time: AOTInductor packages (.pt2), with a signature that is checked at every call.

A package is a shared library: opening one runs its native code. Open what you compiled or trust.
"""

from __future__ import annotations

import json
import os
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.adapters.conditions import class_index
from amed_engine.adapters.exporting import FACTS, check_no_loop, export_denoiser, facts_text, read_facts
from amed_engine.adapters.labels import CONTINUOUS
from amed_engine.adapters.loaded import LoadedFile
from amed_engine.adapters.sealed import read_sealed, write_seal
from amed_engine.adapters.signature import DTYPES, NAMES, Input, Signature
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.sampling.denoiser import Denoised, ask
from amed_engine.sampling.modules import bare, device_of, module_of
from amed_engine.solvers.files import whole
from amed_engine.solvers.targets import check_target

KEY = "amed.signature"  # among the package's metadata
MAX_METADATA = 2**20
_CODE = "/data/aotinductor/"


class Compiled(nn.Module):
    """A denoiser that only runs forward: its inputs checked against a signature, its facts read from it."""

    label_kind: str | None = None
    lends_copies = True
    bottleneck_size: tuple[int, ...] | None = None
    recorded: str | None = None  # the fingerprint of what it was made from
    loaded: LoadedFile | None = None  # what it was read from

    def __init__(self, call: Any, signature: Signature, device: str = "cpu", facts: Mapping[str, Any] | None = None):
        super().__init__()
        self.call, self.signature, self.device = call, signature, torch.device(signature.device or device)
        self.sample_shape, self.label_dim = signature.sample_shape, signature.label_dim
        if signature.continuous:
            self.label_kind = "vector"
        for name in ("sigma_min", "sigma_max"):
            if getattr(signature, name) is not None:
                setattr(self, name, getattr(signature, name))
        self.facts = dict(facts or {})
        for name in self.facts.keys() - {"can_guide"}:
            setattr(self, name, self.facts[name])

    @property
    def can_guide(self) -> bool:
        return self.facts.get("can_guide", True) and self.label_kind not in CONTINUOUS

    @property
    def batch_range(self) -> tuple[int, int]:
        """The smallest and the largest batch."""
        return self.signature.batch

    def forward(self, *inputs: Tensor) -> Denoised:
        """x (B, C, H, W), sigma (B,)[, one-hot rows (B, label_dim)]. Raises ConfigError for what the signature forbids."""
        self._check(*inputs)
        return ask(self.call, *inputs)

    def convert(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """x, time (B,) and labels, rows (B, K) or integers (B,), in the dtypes and shapes that the model takes."""
        names = zip(NAMES, inputs, self.signature.inputs, strict=False)
        taken = tuple(converted(*named) for named in names)
        return (*taken, *inputs[len(taken) :]), {}

    def describe(self) -> str:
        """The dtypes of its inputs, for people."""
        return ", ".join(f"{name} {known.dtype}" for name, known in zip(NAMES, self.signature.inputs, strict=False))

    def _check(self, *inputs: Tensor) -> None:
        self.signature.check(inputs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            raise ConfigError("a compiled model has no gradients; train predictors with the network it was made from")


def check_size(network: Any, shape: Any) -> Any:
    """The shape asked for. Raises ConfigError where a compiled model or an ONNX graph is for another size."""
    compiled = compiled_of(network)
    if shape is None or compiled is None:
        return shape
    own = compiled.signature.inputs[0].shape
    if len(own) != len(shape) or all(n in (None, m) for n, m in zip(own, shape, strict=True)):
        return shape
    sizes = ", ".join("any" if n is None else str(n) for n in own)
    raise ConfigError(
        f"the file's samples are ({sizes}), got shape={tuple(shape)}; leave shape out, or export it for that"
    )


def compiled_of(network: Any) -> Compiled | None:
    """The compiled model that a network is, inside whatever passes its calls on."""
    return inner if isinstance(inner := bare(network), Compiled) else None


def holds_compiled(network: Any) -> bool:
    """Whether a compiled model is the network, or anywhere within it."""
    module = module_of(network)
    return module is not None and any(isinstance(part, Compiled) for part in module.modules())


def converted(name: str, tensor: Tensor, expected: Input) -> Tensor:
    """A tensor in the dtype of an input; rows (B, 1) as (B,), one-hot rows as integers (B,) where it takes these."""
    whole, single = expected.dtype.startswith("int"), expected.shape in ((), (1,))
    if single and whole and tensor.dim() == 2 and tensor.is_floating_point():
        tensor = class_index(tensor, None)
    if single and tensor.dim() in (1, 2) and tensor.numel() == len(tensor):
        tensor = tensor.reshape(-1, *[1] * len(expected.shape))
    if whole and tensor.is_floating_point() and bool((tensor != tensor.round()).any()):
        raise ConfigError(f"{name} must be whole numbers for this model, {expected.describe()}, got {tensor.dtype}")
    return tensor.to(DTYPES[expected.dtype])


def is_package(path: str | os.PathLike) -> bool:
    """Whether a .pt2 file holds compiled code rather than an ExportedProgram."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_CODE in name and name.endswith((".so", ".o", ".cpp")) for name in archive.namelist())
    except Exception:  # zipfile raises what its decoders happen to raise
        return False


def load_compiled(path: str | os.PathLike, *, verify: bool = True) -> Compiled:
    """A denoiser saved by `save_package`. Its signature is read before its code is. Raises FileFormatError, ConfigError.

    verify: compare the file with the hash in it, if there is one; it is read once more for that.
    """
    return read_sealed(path, lambda: _load(path), verify)


def _load(path: str | os.PathLike) -> Compiled:
    loaded = LoadedFile.of(path)
    signature, facts = _read_signature(path)
    if signature.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{path} was compiled for a GPU, but torch sees no CUDA device; compile it for this machine")
    # Inside a CUDA graph a package must not keep events of its own per thread: one at a time, then.
    single = signature.device == "cuda"
    try:
        package = torch._inductor.aoti_load_package(str(path), run_single_threaded=single)
    except Exception as error:  # a loader of native code raises what it happens to raise
        raise FileFormatError(f"{path} cannot be loaded here: {str(error).splitlines()[0]}") from error
    made = Compiled(_OneAtATime(package) if single else package, signature, facts=facts)
    made.loaded = loaded
    return made


class _OneAtATime:
    """A package that several threads may call."""

    def __init__(self, package: Any):
        self.package, self.lock = package, threading.Lock()

    def __call__(self, *inputs: Tensor) -> Any:
        with self.lock:
            return self.package(*inputs)


def _read_signature(path: str | os.PathLike) -> tuple[Signature, dict[str, Any]]:
    for text in _metadata_texts(path):
        told = _metadata(text, path)
        check_no_loop(told, path)
        if isinstance(text := told.get(KEY), str):
            signature = Signature.from_json(_metadata(text, path), str(path))
            return signature, read_facts(told.get(FACTS), signature, path)
    raise ConfigError(
        f"{path} is an AOTInductor package without a signature, and such packages do not check their inputs; compile it with "
        "amed_engine.adapters.save_package"
    )


def _metadata_texts(path: str | os.PathLike) -> list[bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            named = [info for info in archive.infolist() if info.filename.endswith("_metadata.json")]
            return [archive.read(info) for info in named if info.file_size <= MAX_METADATA]
    except Exception as error:  # as above
        raise FileFormatError(f"{path} is a damaged archive: {error}; fetch or write it again") from error


def _metadata(text: str | bytes, path: str | os.PathLike) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: its metadata are no JSON: {error}") from error
    if not isinstance(data, dict):
        raise FileFormatError(f"{path}: its metadata must be an object, got {type(data).__name__}")
    return data


@torch.no_grad()
def save_package(denoiser: nn.Module, path: str | os.PathLike, *, max_batch: int = 64) -> Path:
    """Compile a denoiser with AOTInductor for the device it is on, for batches of 1 to max_batch. Needs a C++ compiler.

    denoiser: what `wrap` returns, or a network with EDM's attributes; float32 inputs. Its range, classes and fingerprint are
    part of the file. Returns the path, which ends in .pt2. Raises ConfigError where the shape of a sample is not known.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ConfigError(f"a package is saved as .pt2, got {path.name!r}")
    check_target(path)
    program = export_denoiser(denoiser, max_batch)
    signature = Signature.of_program(program, _facts(denoiser))
    options = {"aot_inductor.metadata": {KEY: json.dumps(signature.to_json()), FACTS: facts_text(denoiser)}}
    with whole(path) as file:
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)
        write_seal(file)
    return path


def _facts(denoiser: nn.Module) -> dict[str, Any]:
    levels = {name: getattr(denoiser, name, None) for name in ("sigma_min", "sigma_max")}
    known = {name: float(v) for name, v in levels.items() if v is not None and 0 < float(v) < float("inf")}
    continuous = {"continuous": True} if getattr(denoiser, "label_kind", None) in CONTINUOUS else {}
    return {"device": device_of(denoiser).type} | known | continuous
