"""Denoisers as graphs in files, with what is known of them: noise levels, classes, shape of samples, fingerprint.

An ExportedProgram keeps them in buffers of its own, the metadata of packages and ONNX files as a JSON text, "amed.facts".
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amed_engine.adapters.facts import square
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.adapters.sealed import NOTE, write_seal
from amed_engine.adapters.signature import Signature
from amed_engine.errors import ConfigError, FileFormatError, require
from amed_engine.sampling.kept import as_facts, facts_in
from amed_engine.sampling.modes import evaluating
from amed_engine.sampling.modules import device_of, module_of
from amed_engine.solvers.files import whole
from amed_engine.solvers.targets import check_target

FACTS = "amed.facts"  # among a file's metadata
LOOP = "amed_engine"  # of files that hold a whole loop


def facts_text(denoiser: nn.Module) -> str:
    """What `read_facts` reads: the facts of a denoiser and its fingerprint."""
    own = fingerprint(denoiser)
    return json.dumps(facts_in(denoiser) | ({} if own is None else {"fingerprint": own}), sort_keys=True)


def check_no_loop(names: Iterable[str], path: str | os.PathLike) -> None:
    """names: of a file's metadata. Raises ConfigError for those of a whole loop."""
    if LOOP in names:
        raise ConfigError(
            f"{path} holds a whole sampling loop, which Sampler.export wrote, and no denoiser: draw from it with "
            "amed_engine.load_package(path).run(...) or `amed generate --package`; a denoiser is saved by save_package, "
            "save_program or save_onnx"
        )


def read_facts(text: Any, signature: Signature, path: str | os.PathLike) -> dict[str, Any]:
    """What a file's metadata say of the denoiser under "amed.facts", nothing where that is missing; its fingerprint by the name
    "recorded". Raises FileFormatError.
    """
    if text is None:
        return {}
    try:
        told = json.loads(text)
        recorded = told.pop("fingerprint", None)
        facts = as_facts(told)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: its metadata under {FACTS!r} are damaged: {error}") from error
    own = {"label_dim": signature.label_dim, "sample_shape": signature.sample_shape}
    if differing := [name for name, value in own.items() if value is not None and facts.get(name, value) != value]:
        raise FileFormatError(
            f"{path}: its graph takes {own}, its facts say other {', '.join(differing)}; it is damaged"
        )
    return facts | ({"recorded": recorded} if isinstance(recorded, str) else {})


def export_denoiser(denoiser: nn.Module, max_batch: int) -> torch.export.ExportedProgram:
    """(x, sigma[, one-hot rows]) -> its answer as a graph, for batches of 1 to max_batch. Raises ConfigError."""
    shape = getattr(denoiser, "sample_shape", None)
    shape = shape or square(getattr(denoiser, "img_channels", None), getattr(denoiser, "img_resolution", None))
    if shape is None or max_batch < 2:
        raise ConfigError(
            f"need a denoiser that tells its sample shape, and max_batch of 2 or more; got {shape}, {max_batch}"
        )
    check_exportable(denoiser)
    if (check := getattr(denoiser, "check_ready", None)) is not None:
        check()
    x = torch.zeros((2, *shape), dtype=torch.float32, device=device_of(denoiser))
    label_dim = int(getattr(denoiser, "label_dim", 0) or 0)
    inputs = (x, x.new_ones(2), *([x.new_zeros(2, label_dim)] if label_dim else []))
    batch = {0: torch.export.Dim("batch", min=1, max=max_batch)}
    named = inspect.signature(denoiser.forward).bind(*inputs).arguments
    dynamic = {name: (batch,) * len(value) if isinstance(value, tuple) else batch for name, value in named.items()}
    try:
        with evaluating(denoiser):
            denoiser(*inputs)  # the first call finds which dtypes the layers take
            return torch.export.export(denoiser, inputs, dynamic_shapes=dynamic)
    except ConfigError:
        raise
    except Exception as error:  # torch.export has no base class for what it raises
        raise ConfigError(f"the denoiser cannot be exported: {why_not_exported(error)}") from error


def check_exportable(network: Any) -> None:
    """Raises ConfigError for TorchScript, which torch.export does not read."""
    module = module_of(network)
    if module is not None and any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise ConfigError(
            "a TorchScript network is a graph of its own kind, which torch.export does not read: export the module that it was "
            "made of, or a .pt2 of torch.export.save"
        )


def why_not_exported(error: Exception) -> str:
    """What torch.export says, with the way out that it knows."""
    if (most := re.search(r"Dim\('batch'(?:, min=\d+)?, max=(\d+)\)", str(error))) is not None:
        return f"it runs otherwise in batches above {most[1]}; pass max_batch={most[1]} or less"
    told = f"{type(error).__name__}: {_first(error)}"
    return f"{told}; its forward must be torch operators without branches on values, for every batch size"


def _first(error: BaseException) -> str:
    """The first line of the first of the errors that led to this one."""
    return _first(error.__cause__) if error.__cause__ is not None else (str(error).strip().splitlines() or [""])[0]


@torch.no_grad()
def save_program(denoiser: nn.Module, path: str | os.PathLike, *, max_batch: int = 64) -> Path:
    """Save a denoiser as an ExportedProgram for batches of 1 to max_batch; `Sampler(path)` runs it anywhere torch runs.

    denoiser: as `save_package` takes it; its range, classes and fingerprint are part of the file. Returns the path, which ends
    in .pt2. Raises ConfigError.
    """
    path = _named(path, ".pt2")
    program = export_denoiser(denoiser, max_batch)
    return _whole(path, lambda file: torch.export.save(program, file, extra_files={FACTS: facts_text(denoiser)}))


@torch.no_grad()
def save_onnx(denoiser: nn.Module, path: str | os.PathLike, *, max_batch: int = 64) -> Path:
    """Save a denoiser as ONNX: inputs x, sigma (B,) and for classes one-hot rows; `Sampler(path)` and `load_onnx` read it.

    denoiser: as `save_package` takes it; its range, classes and fingerprint are among the file's metadata. Weights of a large
    network lie in a second file beside it. Returns the path, which ends in .onnx. Raises ConfigError.
    """
    for name in ("onnx", "onnxscript"):
        require(name, "onnx", "ONNX")
    path = _named(path, ".onnx")
    names, program = ["x", "sigma", "class_labels"], export_denoiser(denoiser, max_batch)
    signature = Signature.of_program(program)
    try:
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            input_names=names[: len(signature.inputs)],
            output_names=["denoised"],
            verbose=False,
        )
    except (torch.onnx.OnnxExporterError, TypeError) as error:
        raise ConfigError(
            f"the denoiser cannot be written as ONNX: {_first(error)}; save_program and save_package know every operator"
        ) from error
    assert made is not None
    levels = {name: str(value) for name, value in facts_in(denoiser).items() if name in ("sigma_min", "sigma_max")}
    made.model.doc_string = NOTE
    made.model.metadata_props.update({FACTS: facts_text(denoiser), **levels})
    return _whole(path, lambda file: made.save(str(file)))


def _named(path: str | os.PathLike, suffix: str) -> Path:
    if Path(path).suffix != suffix:
        raise ConfigError(f"such a file is saved as {suffix}, got {Path(path).name!r}")
    check_target(path)
    return Path(path)


def _whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """What `write` makes, renamed into place when it is complete."""
    with whole(path) as file:  # large ONNX models keep their weights in a second one
        write(file)
        write_seal(file, set(file.parent.iterdir()) - {file})
    return path
