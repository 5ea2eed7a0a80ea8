"""Sampling loops in files: what such a file says of itself, and how it is read back and run.

A package holds the whole loop, network and predictor included, as one graph (latents[, labels]) -> images. Its facts are one
JSON object inside the file, under "amed_engine": in the metadata of an AOTInductor package and of an ONNX model, among the
extra files of an ExportedProgram.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from amed_engine.adapters.exporting import LOOP
from amed_engine.adapters.loaded import LoadedFile
from amed_engine.adapters.onnx import TYPES, OnnxSession
from amed_engine.adapters.sealed import read_sealed
from amed_engine.checkpoints import load_program
from amed_engine.engine.model import Model
from amed_engine.engine.request import make_request
from amed_engine.engine.result import SampleResult
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.solvers.plan import Plan

KEY = LOOP
MAX_FACTS = 1 << 20  # bytes
DTYPES = {"float32": torch.float32, "float64": torch.float64}

Call = Callable[..., Tensor]  # (latents[, labels]) -> images


@dataclass(frozen=True)
class PackageFacts:
    """What a package says of itself.

    shape: (C, H, W) of one sample. label_dim: columns of the second input, labels (B, label_dim); 0 where there is none.
    continuous: labels are numbers, and no classes. dtype: of latents, labels and images. device: its type, "cpu" or "cuda".
    max_batch: the largest batch of one call. plan: solver and noise levels, its guidance_scale the one that the loop was
    exported with. versions: what wrote it. fingerprint: of the denoiser in it, None for one without weights.
    """

    format: str
    shape: tuple[int, ...]
    label_dim: int
    dtype: str
    device: str
    max_batch: int
    plan: Plan
    versions: tuple[tuple[str, str], ...] = ()
    continuous: bool = False
    fingerprint: str | None = None

    def to_json(self) -> dict:
        inputs = [{"name": "latents", "dtype": self.dtype, "shape": ["batch", *self.shape]}]
        if self.label_dim:
            inputs.append({"name": "labels", "dtype": self.dtype, "shape": ["batch", self.label_dim]})
        return {
            "kind": "amed_package",
            "format": self.format,
            "inputs": inputs,
            "outputs": [{**inputs[0], "name": "images"}],
            "shape": list(self.shape),
            "label_dim": self.label_dim,
            **({"labels": "continuous"} if self.continuous else {}),
            "dtype": self.dtype,
            "device": self.device,
            "max_batch": self.max_batch,
            "nfe": self.plan.nfe,
            "sigma_max": self.plan.sigmas[0],
            "sigma_min": self.plan.sigmas[-1],
            "plan": replace(self.plan, mean=None).to_json(),  # the mean answer is in the graph
            "versions": dict(self.versions),
            "fingerprint": self.fingerprint,
        }

    def texts(self) -> dict[str, str]:
        """As names and texts: the JSON, and beside it what a host without a JSON reader needs to call the loop."""
        return {
            KEY: json.dumps(self.to_json(), sort_keys=True, allow_nan=False),
            f"{KEY}.shape": " ".join(map(str, self.shape)),
            **{f"{KEY}.{name}": str(getattr(self, name)) for name in ("label_dim", "dtype", "device", "max_batch")},
        }

    @classmethod
    def from_text(cls, text: str | bytes | None, path: Path) -> PackageFacts:
        """The facts in a file's metadata. Raises FileFormatError."""
        if text is None:
            raise FileFormatError(f"{path} holds no facts under {KEY!r}; it was not written by Sampler.export")
        if len(text) > MAX_FACTS:
            raise FileFormatError(f"{path}: its facts have {len(text)} bytes, more than {MAX_FACTS}; it is damaged")
        try:
            data = json.loads(text)
            if data["kind"] != "amed_package":
                raise ConfigError(f"its kind is {data['kind']!r}, expected 'amed_package'")
            return cls._read(data)
        # A ConfigError is a ValueError.
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise FileFormatError(f"{path}: its facts cannot be read: {reason}") from error

    @classmethod
    def _read(cls, data: dict) -> PackageFacts:
        shape, label_dim, max_batch = tuple(data["shape"]), data["label_dim"], data["max_batch"]
        if not shape or not all(type(n) is int for n in (*shape, label_dim, max_batch)):
            raise ConfigError("shape, label_dim and max_batch must be integers")
        if min(shape) < 1 or label_dim < 0 or max_batch < 1:
            raise ConfigError(f"shape {shape}, label_dim {label_dim} and max_batch {max_batch} must be positive")
        if data["dtype"] not in DTYPES or data["device"] not in ("cpu", "cuda"):
            raise ConfigError(f"dtype {data['dtype']!r} on {data['device']!r} is not known")
        if (labels := data.get("labels", "classes")) not in ("classes", "continuous"):
            raise ConfigError(f"labels {labels!r} are not known")
        if not isinstance(own := data.get("fingerprint"), (str, type(None))):
            raise ConfigError(f"its fingerprint is no text, got {own!r}")
        plan, versions = Plan.from_json(data["plan"]), tuple(sorted(data["versions"].items()))
        facts = (str(data["format"]), shape, label_dim, data["dtype"], data["device"], max_batch, plan, versions)
        return cls(*facts, labels == "continuous", own)


class Package:
    """A sampling loop read back from a file; it checks what it is given, which the graph inside does not.

    facts: what the file says of itself. loaded: the file.
    """

    def __init__(self, facts: PackageFacts, call: Call, loaded: LoadedFile | None = None):
        self.facts, self.loaded, self._call = facts, loaded, call
        self.device, self.dtype = torch.empty(0, device=facts.device).device, DTYPES[facts.dtype]
        plan = facts.plan
        kind = "vector" if facts.continuous else "rows"
        first, *_, last = plan.sigmas
        self._model = Model(call, facts.shape, facts.label_dim, sigma_min=last, sigma_max=first, label_kind=kind)

    def __repr__(self) -> str:
        format, plan, shape, most = self.facts.format, self.facts.plan, self.facts.shape, self.facts.max_batch
        return f"Package({format}, {plan.describe()}, shape {shape}, batches to {most}, {self.facts.device})"

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        return self.facts.plan.nfe

    @torch.no_grad()
    def run(
        self,
        batch: int | Sequence[int] | Tensor,
        class_labels: int | float | Sequence | Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> SampleResult:
        """Draw samples; arguments and result as in `Sampler.run`. A batch above `max_batch` runs in pieces.

        Guidance is that of the file. The images are not looked at: NaN and infinite values come through. Raises ConfigError.
        """
        started = time.perf_counter()
        request = make_request(self._model, batch, class_labels, generator, dtype=self.dtype, device=self.device)
        pieces = list(zip(*(tensor.split(self.facts.max_batch) for tensor in request.inputs), strict=True))
        images = [self._call(*map(_plain, piece)) for piece in pieces]
        return SampleResult(
            images=images[0] if len(images) == 1 else torch.cat(images),
            nfe=self.nfe,
            seeds=request.seeds,
            labels=request.classes,
            backend=self.facts.format,
            plan=self.facts.plan,
            chunks=len(pieces),
            seconds=time.perf_counter() - started,
        )


def _plain(tensor: Tensor) -> Tensor:
    """In the layout that the graph was compiled for: dense, and aligned for vector loads."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def load_package(path: str | os.PathLike, *, verify: bool = True) -> Package:
    """A package that `Sampler.export` wrote as "pt2", "exported" or "onnx"; the file itself says which.

    A .pt2 holds compiled code that runs when it is loaded: open only those you trust, as any program. Its facts are read
    before that. verify: compare the file with the hash in it before a runtime sees it; a file without one loads as it is. For
    this the whole file, and that of an ONNX model's weights, is read once more, a piece at a time. ONNX Runtime gets as many
    threads as torch has now (`torch.set_num_threads`). Raises FileFormatError for another file, ConfigError where this machine
    lacks the device.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"{path} is not a file; pass what Sampler.export wrote")
    if path.suffix == ".onnx":
        return _open_onnx(path, verify)
    if path.suffix == ".json":
        raise FileFormatError(f"{path} holds no network; read a plan with read_plan, a schedule with read_schedule")
    return read_sealed(path, lambda: _open_archive(path), verify)


def _open_archive(path: Path) -> Package:
    loaded = LoadedFile.of(path)
    compiled, text = _look_into(path)
    facts = PackageFacts.from_text(text, path)
    if facts.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{path} is for a CUDA device, but torch sees none; export from a Sampler with device='cpu'")
    return Package(facts, _open_compiled(path) if compiled else _open_exported(path, facts), loaded)


def _look_into(path: Path) -> tuple[bool, bytes | str | None]:
    """Whether a .pt2 holds compiled code, and the text of its facts; nothing in it runs."""
    try:
        with zipfile.ZipFile(path) as archive:
            compiled = [info for info in archive.infolist() if "/data/aotinductor/" in info.filename]
            named = [i for i in archive.infolist() if i.filename.endswith(f"/extra/{KEY}") and not compiled]
            named += [info for info in compiled if info.filename.endswith("wrapper_metadata.json")]
            texts = [archive.read(info) for info in named if info.file_size <= 2 * MAX_FACTS]
    except Exception as error:  # zipfile raises what its decompressors happen to raise
        raise FileFormatError(
            f"{path} is no package of Sampler.export, neither .onnx nor a .pt2 archive: {error}"
        ) from error
    if not compiled:
        return False, texts[0] if texts else None
    try:
        return True, json.loads(texts[0]).get(KEY) if texts else None
    except (ValueError, AttributeError) as error:
        raise FileFormatError(f"{path}: its metadata is not a JSON object: {error}") from error


def _open_exported(path: Path, facts: PackageFacts) -> Call:
    program = load_program(path, verify=False)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [values.get(name) for name in program.graph_signature.user_inputs]
    _check_graph(path, facts, [(str(t.dtype), *t.shape[1:]) for t in tensors if isinstance(t, Tensor)])
    return program.module()


def _check_graph(path: Path, facts: PackageFacts, found: list[tuple]) -> None:
    """Whether the graph takes what its facts say: (dtype, sizes of one sample) of every input."""
    rows = [facts.shape, *([(facts.label_dim,)] if facts.label_dim else [])]
    if found != (expected := [(str(DTYPES[facts.dtype]), *row) for row in rows]):
        raise FileFormatError(
            f"{path}: its graph takes {found}, its facts say {expected}; it is damaged, export it again"
        )


def _open_compiled(path: Path) -> Call:
    # Imported for its side effect of making torch._inductor.aoti_load_package an attribute.
    import_module("torch._inductor")
    try:
        return torch._inductor.aoti_load_package(str(path))
    except Exception as error:  # the loader raises what its parts happen to raise
        raise FileFormatError(
            f"{path} cannot be loaded: {first_line(error)}; it is damaged, or for another torch or machine"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open_onnx(path: Path, verify: bool) -> Package:
    session = OnnxSession(path, torch.get_num_threads(), verify=verify)
    facts = PackageFacts.from_text(session.metadata.get(KEY), path)
    if facts.device != "cpu":
        raise FileFormatError(
            f"{path}: an ONNX loop is opened on the CPU, its facts say {facts.device!r}; it is damaged"
        )
    kinds = {kind: f"torch.{name}" for kind, name in TYPES.items()}
    _check_graph(path, facts, [(kinds.get(wanted.type, wanted.type), *wanted.shape[1:]) for wanted in session.inputs])
    return Package(facts, lambda *inputs: session(*inputs)[0], session.loaded)
