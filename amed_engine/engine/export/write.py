"""Writing the whole sampling loop, network and predictor included, to one file that other programs run.

FORMATS has a writer per format: "pt2" is compiled by AOTInductor, for hosts of Python or C++ on this kind of machine;
"exported" is the same graph as an ExportedProgram, compiled where it is used; "onnx" is for every runtime that reads ONNX.
"plan" and "schedule" leave the network out: JSON for `Stepper`, the C API and CuPy, and noise levels for diffusers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import amed_engine.kernels as kernels
from amed_engine.adapters.compiled import holds_compiled
from amed_engine.adapters.exporting import check_exportable, why_not_exported
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.adapters.sealed import NOTE, write_seal
from amed_engine.checkpoints.native import versions
from amed_engine.engine.export.package import DTYPES, PackageFacts, first_line, load_package
from amed_engine.engine.export.write_plan import ADDS_NOISE, DRAW_HERE, write_plan
from amed_engine.engine.export.write_schedule import write_schedule
from amed_engine.engine.model import Model
from amed_engine.engine.request import Request, make_request
from amed_engine.engine.runner import BoundLoop
from amed_engine.errors import AmedError, ConfigError, require
from amed_engine.sampling.denoiser import bind_labels
from amed_engine.sampling.modes import evaluating
from amed_engine.sampling.modules import passed_on
from amed_engine.solvers.files import whole
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program

# Two of the sizes that compilers treat apart, 1 and 2, and one that the graph was not traced with.
CHECKED_BATCHES = (1, 2, 5)
_TRACED_BATCH = 3


class Exported(NamedTuple):
    """What was written: the file, per checked batch size the largest difference to `Sampler.run`, and what it follows."""

    path: Path
    format: str
    differences: dict[int, float]
    plan: Plan


@dataclass(frozen=True)
class Job:
    """A loop to write: bound to its model, program and guidance, and the plan it follows, that guidance in it."""

    loop: BoundLoop
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    max_batch: int = 256
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        return self.loop.program

    @property
    def model(self) -> Model:
        return self.loop.model

    def request(self, batch: int) -> Request:
        """Latents and labels as `Sampler.run` would have them for these seeds."""
        labels = self.loop.model.example_labels(batch)
        return make_request(self.loop.model, range(batch), labels, None, dtype=self.dtype, device=self.device)

    def facts(self, format: str) -> PackageFacts:
        shape, label_dim = self.request(1).latents.shape[1:], self.loop.model.label_dim
        dtype = next(name for name, known in DTYPES.items() if known == self.dtype)
        device = "cpu" if format == "onnx" else self.device.type
        wrote = tuple(versions().items())
        known = {"continuous": self.loop.model.continuous, "fingerprint": fingerprint(self.loop.model.network)}
        facts = (format, tuple(shape), label_dim, dtype, device, self.max_batch, self.plan, wrote)
        return PackageFacts(*facts, **known)


class LoopModule(nn.Module):
    """The loop as a module (latents (B, C, H, W)[, labels (B, label_dim)]) -> images, which torch.export can read."""

    def __init__(self, loop: BoundLoop):
        super().__init__()
        network = _unwrapped(loop.model.network)
        self._loop = replace(loop, model=replace(loop.model, network=network))
        # Registered, so that their parameters are weights of the graph and not constants in it.
        self.network = network if isinstance(network, nn.Module) else None
        self.predictor = loop.program.predictor if isinstance(loop.program.predictor, nn.Module) else None

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._loop(latents, labels)


def _unwrapped(network: Any) -> Any:
    """AOTInductor compiles by itself, and a file runs on one device: what torch.compile or DataParallel wraps."""
    found = passed_on(network) if isinstance(network, nn.Module) else None
    torchs = found is not None and (
        found[0] == "_orig_mod" or type(network).__module__.startswith("torch.nn.parallel.")
    )
    return _unwrapped(found[1]) if torchs else network  # type: ignore[index]


def trace(job: Job) -> torch.export.ExportedProgram:
    """The loop as a graph of plain torch operators, for every batch from 1 to max_batch. Raises ConfigError."""
    inputs = job.request(_TRACED_BATCH).inputs
    batch = torch.export.Dim("batch", min=1, max=job.max_batch)
    try:
        with kernels.use("reference"), torch.no_grad():
            _first_call(job)
            return torch.export.export(LoopModule(job.loop), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    except ConfigError:
        raise
    except Exception as error:  # torch.export has no base class for what it raises
        raise ConfigError(f"the model cannot be exported: {why_not_exported(error)}") from error


def _first_call(job: Job) -> None:
    """The first call of a network of half precision finds what its layers take, which a graph cannot."""
    request = job.request(1)
    bound = bind_labels(job.model.denoise, request.labels, job.loop.scale)
    bound(request.latents, request.latents.new_full((1,), float(job.program.sigmas[0])))


# ---- one writer per format: (job, file) ----


def write_exported(job: Job, file: Path) -> None:
    torch.export.save(trace(job), file, extra_files=job.facts("exported").texts())


def write_compiled(job: Job, file: Path) -> None:
    """AOTInductor: native code for the device the sampler is on, behind a C++ and a Python loader."""
    from torch._inductor import aoti_compile_and_package

    settings = {**job.options, "aot_inductor.metadata": job.facts("pt2").texts()}
    try:
        aoti_compile_and_package(trace(job), package_path=str(file), inductor_configs=settings)
    except ConfigError:
        raise
    except Exception as error:  # as above; a missing compiler is the usual one
        raise AmedError(
            f"AOTInductor could not compile the loop: {first_line(error)}; it needs a C++ compiler, and on a "
            "GPU the headers of CUDA; format='exported' needs neither"
        ) from error


def write_onnx(job: Job, file: Path) -> None:
    for name in ("onnx", "onnxscript"):
        require(name, "onnx", "ONNX")
    names = ["latents", "labels"][: 2 if job.loop.model.label_dim else 1]
    traced = trace(job)
    try:
        program = torch.onnx.export(
            traced, (), dynamo=True, input_names=names, output_names=["images"], verbose=False, **job.options
        )
    except (torch.onnx.OnnxExporterError, TypeError) as error:
        raise ConfigError(
            f"the loop cannot be written as ONNX: {first_line(_root(error))}; formats 'exported' and 'pt2' know every operator"
        ) from error
    assert program is not None
    program.model.doc_string = NOTE
    program.model.metadata_props.update(job.facts("onnx").texts())
    program.save(str(file))


def _root(error: BaseException) -> BaseException:
    """The first of the errors that led to this one."""
    return error if error.__cause__ is None else _root(error.__cause__)


FORMATS: dict[str, Callable[[Job, Path], Any]] = {
    "pt2": write_compiled,
    "exported": write_exported,
    "onnx": write_onnx,
    "plan": lambda job, file: write_plan(job, file, **job.options),
    "schedule": lambda job, file: write_schedule(job, file, **job.options),
}
# Of the formats that take no options of a compiler.
OPTIONS = {"exported": (), "plan": ("freeze",), "schedule": ("alphas_cumprod",)}
# Those that `load_package` reads back: a loop to run, and so one to check.
LOOPS = ("pt2", "exported", "onnx")


def export(job: Job, path: str | os.PathLike, format: str, *, verify: bool = True) -> Exported:
    """Write the file, or nothing: it is renamed into place when it is complete and, with verify, gives the same images."""
    path = Path(path)
    _check(job, path, format)
    # Large ONNX models keep their weights in a second file beside it.
    with whole(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*treespec", FutureWarning)  # torch's own, about itself
        with evaluating(job.model.module):
            FORMATS[format](job, file)
            if format in LOOPS:
                write_seal(file, set(file.parent.iterdir()) - {file})
            differences = _compare(job, file) if verify and format in LOOPS else {}
    return Exported(path, format, differences, job.plan)


def _check(job: Job, path: Path, format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if not isinstance(job.options, Mapping):
        raise ConfigError(f"options must be a dict of names and values, got {type(job.options).__name__}")
    if job.program.noises and format in LOOPS:
        raise ConfigError(f"{ADDS_NOISE}, and a file has no input for it; {DRAW_HERE}")
    suffix = ".onnx" if format == "onnx" else ".pt2" if format in LOOPS else ".json"
    known = OPTIONS.get(format, job.options)
    if not set(job.options) <= set(known):
        raise ConfigError(f"format {format!r} takes {', '.join(known) or 'no options'}, got {sorted(job.options)}")
    if path.suffix != suffix or path.is_dir():
        raise ConfigError(f"format {format!r} is written to a {suffix} file, got {str(path)!r}; name it loop{suffix}")
    if format in LOOPS and holds_compiled(job.model.network):
        raise ConfigError(
            f"format {format!r} is one graph of torch operators, and this network is compiled already (ONNX, or an AOTInductor "
            "package): export format='plan', a table of numbers for the loop round it, or the network that it was made from"
        )
    if format in LOOPS:
        check_exportable(job.model.network)
    if not isinstance(job.max_batch, int) or isinstance(job.max_batch, bool) or job.max_batch < _TRACED_BATCH:
        raise ConfigError(f"max_batch must be an integer of at least {_TRACED_BATCH}, got {job.max_batch!r}")


@torch.no_grad()
def _compare(job: Job, file: Path) -> dict[int, float]:
    """Largest differences between the file's images and the loop's, per batch size. Raises AmedError if they are large."""
    package, differences = load_package(file), {}
    for batch in (size for size in CHECKED_BATCHES if size <= job.max_batch):
        inputs = job.request(batch).inputs
        expected = job.loop(*inputs)
        images = package.run(*(tensor.to(package.device) for tensor in inputs)).images.to(expected)
        differences[batch] = float((images - expected).abs().max())
        # Rounding differs between compilers; half precision rounds a thousand times coarser.
        allowed = (0.1 if job.loop.model.autocast else 1e-3) * max(1.0, float(expected.abs().max()))
        if not differences[batch] <= allowed:
            raise AmedError(
                f"the exported loop differs from the sampler by {differences[batch]:.3g} on a batch of {batch}, more than "
                f"{allowed:.3g}: nothing was written; pass verify=False to keep it all the same"
            )
    return differences
