"""What a dataset is: everything that decides its bytes, kept in `manifest.json`, and where it was first drawn."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from amed_engine.checkpoints.native import versions
from amed_engine.datasets.formats import FORMATS, Format
from amed_engine.datasets.seeds import Seeds
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.solvers.files import MAX_BYTES, read_json
from amed_engine.solvers.temporary import Temporary

NAME, VERSION = "manifest.json", 1
LARGEST_BATCH = 64
PLACE = ("device", "arithmetic", "versions")  # what may change on the way: see `place`
NAMES = ("model",)  # of a source with a fingerprint: what it is called, which decides nothing
WORDS = ("schedule", "rho")  # of a plan, how its noise levels were asked for
ARITHMETIC = (
    "graphs",
    "kernels",
    "matmul",
    "convolution",
    "algorithms",
)  # of a source's identity, what its device brings


def fitting_batch(shard: int) -> int:
    """The largest batch of at most 64 that leaves no row of a shard empty; 64 where that would be less than 32."""
    best = max(size for size in range(1, min(shard, LARGEST_BATCH) + 1) if shard % size == 0)
    return best if best >= min(shard, LARGEST_BATCH // 2) else LARGEST_BATCH


@dataclass(frozen=True)
class Job:
    """source: what `decisive` leaves of `Source.identity`. seeds: in the order of the shards. labels: None where the seeds
    draw them, else what `labels_told` says of those given. format: a key of FORMATS. stored, shape: of one sample as it is
    kept. shard: samples in each. batch: samples computed at once, the last ones of a shard filled up to it. threads: of torch,
    on a CPU."""

    source: Mapping[str, Any]
    seeds: Seeds
    labels: Any
    format: str
    stored: str
    shape: tuple[int, ...]
    shard: int
    batch: int
    threads: int

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {self.format!r}")
        for name in ("shard", "batch", "threads"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))

    @property
    def shards(self) -> int:
        return -(-len(self.seeds) // self.shard)

    @property
    def kind(self) -> Format:
        return FORMATS[self.format]

    def name(self, shard: int) -> str:
        return f"shard-{shard:06d}{self.kind.suffix}"

    def rows(self, shard: int) -> range:
        """Places of a shard's samples among the seeds."""
        return range(shard * self.shard, min((shard + 1) * self.shard, len(self.seeds)))

    def batches(self, shard: int) -> Iterator[range]:
        rows = self.rows(shard)
        for start in range(rows.start, rows.stop, self.batch):
            yield range(start, min(start + self.batch, rows.stop))

    @cached_property
    def about(self) -> dict[str, Any]:
        """What travels in every shard."""
        return {"amed_dataset": VERSION, **self.source, "batch": self.batch, "threads": self.threads}

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data |= {"source": dict(self.source), "seeds": str(self.seeds), "shape": list(self.shape)}
        return {"amed_dataset": VERSION, **data}

    @classmethod
    def from_json(cls, data: Any) -> Job:
        """Raises ValueError for what is no job."""
        expected = {"amed_dataset", *PLACE, *cls.__dataclass_fields__}
        if not isinstance(data, dict) or data.keys() != expected or data["amed_dataset"] != VERSION:
            raise ValueError(f"expected an object of {', '.join(sorted(expected))} with amed_dataset {VERSION}")
        fields = {name: data[name] for name in cls.__dataclass_fields__}
        if not isinstance(fields["source"], dict) or not isinstance(fields["seeds"], str):
            raise ValueError("source must be an object and seeds text")
        shape = fields["shape"]
        if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"shape must be a list of positive integers, got {str(shape)[:80]}")
        return cls(**{**fields, "seeds": Seeds.of(fields["seeds"]), "shape": tuple(shape)})


def whole_number(name: str, value: Any, least: int) -> int:
    """Of any kind of integer. Raises ConfigError."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and (number := operator.index(value)) >= least:
            return number
    raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")


def labels_told(labels: np.ndarray | None) -> Any:
    """A label, or the numbers, of all samples; of different ones, their SHA-256; None where the seeds draw them."""
    if labels is None:
        return None
    if bool((labels == labels[:1]).all()):
        return labels[0].tolist()
    return {"sha256": hashlib.sha256(np.ascontiguousarray(labels).data).hexdigest(), "dtype": str(labels.dtype)}


def decisive(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What makes another job of a source, wherever it is drawn."""
    return {name: value for name, value in identity.items() if name not in ARITHMETIC}


def place(identity: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What the last bits of a sample depend on beside the job."""
    arithmetic = {name: identity[name] for name in ARITHMETIC if name in identity}
    return {"device": device, "arithmetic": arithmetic, "versions": {**versions(), "numpy": np.__version__}}


def save_manifest(folder: Path, job: Job, where: Mapping[str, Any]) -> None:
    """Of several that do so at once one is the first, and stays. Raises ConfigError for more than a manifest may have."""
    told = {**job.to_json(), **where}
    data = (json.dumps({**told, "sha256": _digest(told)}, indent=2, allow_nan=False) + "\n").encode()
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"the manifest would have {len(data)} bytes, more than {MAX_BYTES}: {len(job.seeds)} seeds are too many to be "
            "named one by one; name ranges, e.g. 0-49999"
        )
    with Temporary(folder / NAME) as made:
        made.path.write_bytes(data)
        made.flush()
        with contextlib.suppress(FileExistsError):
            made.claim()


def load_manifest(folder: Path) -> tuple[Job, dict[str, Any]]:
    """The job of a dataset's folder, and where it was first drawn. Raises FileFormatError."""
    remedy = "restore it, or draw into another folder"

    def made(data: Any) -> tuple[Job, dict[str, Any]]:
        told = {name: data[name] for name in data if name != "sha256"} if isinstance(data, dict) else {}
        if not told or data.get("sha256") != _digest(told):
            raise ValueError("it is not what was written: its sha256 is another")
        data = told
        job = Job.from_json(data)
        return job, {name: data[name] for name in PLACE}

    path = folder / NAME
    if not path.exists():
        raise FileFormatError(f"{folder} is no dataset: it has no {NAME}; pass a folder that `amed generate` wrote")
    try:
        return read_json(path, made, "dataset's manifest", remedy)
    except FileFormatError as error:
        raise error if remedy in str(error) else FileFormatError(f"{error}; {remedy}") from error


def _digest(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def difference(theirs: Job, ours: Job) -> str | None:
    """The first entries in which two jobs differ, for a message; None for the same job."""
    found = list(_differences(_told(theirs), _told(ours)))
    found.sort(key=lambda text: text.split(" is ")[0].count("."))  # what was asked before what followed from it
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more if found else None


def _told(job: Job) -> dict[str, Any]:
    told = json.loads(json.dumps(job.to_json()))
    if isinstance(plan := told["source"].get("plan"), dict):
        told["source"]["plan"] = {name: value for name, value in plan.items() if name not in WORDS}
    if (source := told["source"]).get("fingerprint") is not None:
        told["source"] = {name: value for name, value in source.items() if name not in NAMES}
    return told


def _differences(theirs: Any, ours: Any, path: str = "") -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*theirs, *(name for name in ours if name not in theirs)]:
            yield from _differences(theirs.get(name), ours.get(name), f"{path}.{name}" if path else name)
    elif theirs != ours:
        yield f"{path} is {_brief(theirs)} there, {_brief(ours)} here"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    if len(text) <= 60:
        return text
    return f"{text[:-1][:56]}...{text[-1]}"  # with its quote or bracket
