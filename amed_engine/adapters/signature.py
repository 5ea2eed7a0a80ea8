"""What a compiled model expects of its inputs, checked before it runs.

Packages of AOTInductor check nothing: with another shape, dtype or stride they read memory that means something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.errors import ConfigError, FileFormatError

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64")}
NAMES = ("x", "sigma", "class_labels")
UNBOUNDED = 2**31 - 1


class Input(NamedTuple):
    """One tensor: its dtype by name, and its shape without the batch."""

    dtype: str
    shape: tuple[int | None, ...]  # None: any size

    def describe(self) -> str:
        sizes = ["B", *("any" if n is None else str(n) for n in self.shape)]
        return f"{self.dtype} ({', '.join(sizes)})"


@dataclass(frozen=True)
class Signature:
    """The inputs x, sigma and, for classes, one-hot rows, or rows of numbers (continuous); how small and large a batch may be;
    the kind of device ("cpu", "cuda", "" for any); and the range of noise levels, where it is known."""

    inputs: tuple[Input, ...]
    batch: tuple[int, int] = (1, UNBOUNDED)
    device: str = ""
    sigma_min: float | None = None
    sigma_max: float | None = None
    continuous: bool = False

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        shape = self.inputs[0].shape
        return None if None in shape else tuple(n for n in shape if n is not None)

    @property
    def label_dim(self) -> int:
        return (self.inputs[2].shape[0] or 0) if len(self.inputs) > 2 and self.inputs[2].shape else 0

    @property
    def takes_integers(self) -> bool:
        """Whether classes are told as integers (B,) instead of rows."""
        return len(self.inputs) > 2 and not self.inputs[2].shape and self.inputs[2].dtype in ("int32", "int64")

    def check(self, tensors: Sequence[Any], *, strides: bool = True) -> None:
        """Raise ConfigError for a tensor of another number, dtype, shape, batch or device than expected, or (with `strides`)
        one that is not contiguous.
        """
        if len(tensors) != len(self.inputs):
            raise ConfigError(
                f"the model takes {len(self.inputs)} inputs ({', '.join(self._names())}), got {len(tensors)}"
            )
        for name, tensor, expected in zip(self._names(), tensors, self.inputs, strict=True):
            if not isinstance(tensor, Tensor):
                raise ConfigError(f"{name} must be a tensor, {expected.describe()}, got {type(tensor).__name__}")
            self._check_one(name, tensor, expected)
            if strides and not tensor.is_contiguous():
                raise ConfigError(f"{name} must be contiguous for this model, got strides {tensor.stride()}")
            if tensor.shape[0] != tensors[0].shape[0]:
                raise ConfigError(f"{name} has {tensor.shape[0]} rows for a batch of {tensors[0].shape[0]}")
        low, high = self.batch
        if not low <= tensors[0].shape[0] <= high:
            allowed = f"{low}" if low == high else f"{low} to {high}"
            raise ConfigError(
                f"the model was compiled for a batch of {allowed}, got {tensors[0].shape[0]}; ask for that many samples, or "
                "compile it with a dynamic batch"
            )

    def check_named(self, x: Tensor, given: Mapping[str, Tensor], expected: Mapping[str, Input]) -> None:
        """Raise ConfigError for conditions by name that are missing, unknown, or not as `check` wants its tensors."""
        if given.keys() != expected.keys():
            raise ConfigError(
                f"the model takes {', '.join(expected) or 'no conditions'}, got {', '.join(given) or 'none'}"
            )
        for name, tensor in given.items():
            self._check_one(name, tensor, expected[name])
            if tensor.shape[0] != x.shape[0]:
                raise ConfigError(f"{name} has {tensor.shape[0]} rows for a batch of {x.shape[0]}")

    def _names(self) -> tuple[str, ...]:
        return NAMES[: len(self.inputs)]

    def _check_one(self, name: str, tensor: Tensor, expected: Input) -> None:
        shape = tuple(tensor.shape)
        fits = len(shape) == len(expected.shape) + 1 and all(
            want in (None, got) for want, got in zip(expected.shape, shape[1:], strict=True)
        )
        if not fits or tensor.dtype != DTYPES[expected.dtype]:
            got = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(f"{name} must be {expected.describe()} for this model, got {got} {shape}")
        if self.device and tensor.device.type != self.device:
            raise ConfigError(
                f"{name} is on {tensor.device}, the model runs on {self.device}; pass device={self.device!r}"
            )

    def to_json(self) -> dict[str, Any]:
        data = asdict(self) | {"inputs": [{"dtype": i.dtype, "shape": list(i.shape)} for i in self.inputs]}
        return {name: value for name, value in data.items() if name != "continuous" or value}

    @classmethod
    def from_json(cls, data: Any, source: str) -> Signature:
        """The signature that `to_json` wrote. Raises FileFormatError for anything else."""
        try:
            inputs = tuple(Input(_dtype(i["dtype"]), tuple(_size(n) for n in i["shape"])) for i in data["inputs"])
            low, high = (_size(n) or 1 for n in data["batch"])
            levels = (_number(data["sigma_min"]), _number(data["sigma_max"]))
            made = cls(inputs, (low, high), str(data["device"]), *levels, bool(data.get("continuous", False)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"{source}: its signature is damaged: {type(error).__name__} {error}") from error
        if not 2 <= len(inputs) <= len(NAMES) or not low <= high:
            raise FileFormatError(
                f"{source}: its signature has {len(inputs)} inputs, batch {low} to {high}; expected x, sigma"
            )
        return made

    @classmethod
    def of_program(cls, program: torch.export.ExportedProgram, facts: Mapping[str, Any] | None = None) -> Signature:
        """That of an exported denoiser; facts: device, sigma_min and sigma_max. Raises ConfigError for another kind."""
        values = [
            node.meta["val"]
            for node in program.graph.nodes
            if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
        ]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) not in (2, 3) or any(t.dim() == 0 or _name(t.dtype) not in DTYPES for t in tensors):
            raise ConfigError(
                f"an exported denoiser takes x, sigma (B,) and perhaps class_labels (B, K), this one {len(tensors)} tensors"
            )
        inputs = tuple(Input(_name(t.dtype), tuple(map(_static, t.shape[1:]))) for t in tensors)
        return cls(inputs, _range(tensors[0].shape[0], program), **(facts or {}))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _static(size: int | torch.SymInt) -> int | None:
    return size if isinstance(size, int) else None


def _range(size: int | torch.SymInt, program: torch.export.ExportedProgram) -> tuple[int, int]:
    """How small and large a size may be."""
    if isinstance(size, int):
        return size, size
    bounds = program.range_constraints.get(size.node.expr)
    if bounds is None:
        return 1, UNBOUNDED
    # Compared, not asked: torch's own infinity says that it is finite.
    upper = int(bounds.upper) if bounds.upper < UNBOUNDED else UNBOUNDED
    return max(int(bounds.lower), 1), upper


def _dtype(name: Any) -> str:
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}")
    return name


def _size(n: Any) -> int | None:
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise ValueError(f"size {n!r}")
    return n


def _number(value: Any) -> float | None:
    if value is not None and not (isinstance(value, (int, float)) and 0 < value < float("inf")):
        raise ValueError(f"noise level {value!r}")
    return value
