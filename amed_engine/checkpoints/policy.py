"""What the published pickles may hold: which names, and what stands in for the functions they call."""

from __future__ import annotations

import io
import math
import os
import re
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amed_engine.checkpoints.pickles import Policy, run, run_file
from amed_engine.checkpoints.plain_data import MAX_NAME, MAX_REPEATS, Record, Ref, Refused, show

# Classes whose source travels in the file: the networks, losses and augmentation of EDM, the predictor and loss of AMED.
CLASSES = {
    *("AMED_predictor", "AMED_loss", "Linear", "Conv2d", "GroupNorm", "PositionalEmbedding", "FourierEmbedding"),
    *("UNetBlock", "SongUNet", "DhariwalUNet", "EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"),
    *("EDMLoss", "VPLoss", "VELoss", "AugmentPipe"),
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before it wrote zip archives
MAX_DIMENSIONS = 64  # torch's own bound
OBJECT = (Ref("builtins", "object"), Ref("__builtin__", "object"))  # its names before protocol 3 and since
NUMPY = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q", "b1": "?"}


def read_published(path: str | os.PathLike) -> Any:
    """The data of a published pickle: dicts, lists, CPU tensors and Records. No code of the file is run.

    Raises UnsafeFileError naming what is not on the list, or where the file is damaged.
    """
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    storages, texts = Limited(_storage, "storages", size), Limited(_bytes, "bytes", size)
    sized = {
        "torch.storage._load_from_bytes": storages,
        "torch._utils._rebuild_tensor_v2": Views(size),
        "_codecs.encode": texts,
    }
    return run_file(path, Policy(_NAMES, {**_CALLS, **sized}))


def _object(meta: Any) -> Record:
    if not isinstance(meta, dict) or not {"type", "class_name", "state"} <= meta.keys():
        raise Refused("an object in it has no class_name and state")
    kind = meta["class_name"]
    if meta["type"] != "class" or not isinstance(kind, str) or kind not in CLASSES:
        raise Refused(f"it brings its own class {show(kind)}, whose source is not run")
    return Record(meta["class_name"], meta["state"])


class Limited:
    """A function of contents of the file, together not larger than the file: it may read the same ones again and again."""

    def __init__(self, function: Callable[..., Any], what: str, limit: int):
        self.function, self.what, self.left = function, what, limit

    def __call__(self, data: Any, *rest: Any) -> Any:
        self.left -= len(data) if isinstance(data, (str, bytes)) else 0
        if self.left < 0:
            raise Refused(f"its {self.what} are larger than itself")
        return self.function(data, *rest)


def _bytes(text: Any, encoding: Any = None) -> bytes:
    """`_codecs.encode(text, "latin1")`: how the protocols before 3 write bytes."""
    if type(text) is not str or encoding != "latin1":
        raise Refused("bytes in it are not written as latin1 text")
    return text.encode("latin1")


def _storage(data: Any) -> Tensor:
    """The flat tensor in what the older torch.save makes of one storage: four pickles, a list of keys, the bytes."""
    if not isinstance(data, bytes):
        raise Refused("a storage in it is not made of bytes")
    stream, policy = io.BytesIO(data), Policy(_NAMES, {}, _Claim)
    magic, protocol, system, flat, keys = (run(stream, policy, "a storage in it") for _ in range(5))
    if magic != MAGIC or protocol != PROTOCOL or not isinstance(flat, _Claim) or keys != [flat.key]:
        raise Refused("a storage in it is of an unknown form")
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise Refused("a storage in it is not little-endian")
    (count,) = struct.unpack("<q", stream.read(8))
    values = bytearray(stream.read())  # torch reads it in place, and wants to be able to write
    if count != flat.count or len(values) != count * flat.dtype.itemsize:
        raise Refused(f"a storage in it claims {flat.count} numbers and holds {len(values)} bytes")
    return torch.frombuffer(values, dtype=flat.dtype) if count else torch.empty(0, dtype=flat.dtype, device="cpu")


class _Claim:
    """What a storage's pickle says of the bytes that follow it."""

    def __init__(self, ident: Any):
        if not isinstance(ident, tuple) or len(ident) not in (5, 6) or ident[0] != "storage" or any(ident[5:]):
            raise Refused("a storage in it has another persistent id than torch's")
        _, cls, self.key, _, self.count = ident[:5]
        if not isinstance(cls, Ref) or cls.name not in STORAGES or not isinstance(self.key, str):
            raise Refused("a storage in it has an unknown type")
        self.dtype = STORAGES[cls.name]


class Views:
    """`_rebuild_tensor_v2`: tensors within their storages, together not MAX_REPEATS times larger than the file."""

    def __init__(self, size: int):
        self.left = MAX_REPEATS * size

    def __call__(self, flat: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(flat, Tensor):
            raise Refused("a tensor in it has no storage")
        count = check_view(flat.numel(), offset, size, stride)
        self.left -= count * flat.element_size()
        if self.left < 0:
            raise Refused(f"its tensors are more than {MAX_REPEATS} times larger than itself")
        return torch.as_strided(flat, size, stride, offset if count else 0)


def check_view(held: int, offset: Any, size: Any, stride: Any) -> int:
    """How many numbers the tensor of these sizes and strides has, all of them within a storage of `held`."""
    shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_DIMENSIONS
    numbers = (offset, *size, *stride) if shaped else ()
    if not numbers or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise Refused("a tensor in it has impossible sizes")
    count, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= held or count > held):
        raise Refused(f"a tensor in it of {tuple(size)} reaches beyond its storage of {held}")
    return count


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter in it is no tensor")
    return data


def _scalar(dtype: Any, data: Any) -> float | int | bool:
    """A number of numpy's: the networks of EDM hold square roots. `dtype.state` has the byte order."""
    code = NUMPY.get(dtype.kind) if isinstance(dtype, Record) else None
    order = dtype.state[1] if code and isinstance(dtype.state, tuple) else "<"
    if code is None or order not in ("<", "|") or not isinstance(data, bytes):
        raise Refused("a number of numpy's in it has an unknown type")
    return struct.unpack(f"<{code}", data)[0]


def _empty(kind: type) -> Callable[..., Any]:
    """Makes an empty container, which later operations fill: a call with contents could repeat them without end."""

    def make(*arguments: Any) -> Any:
        if any(arguments):
            raise Refused(f"a {kind.__name__} in it is made from arguments")
        return kind()

    return make


def _names(values: Any = ()) -> set:
    """A set, filled later or (before protocol 4) made from a list: of a few names, lest it is copied without end."""
    if not isinstance(values, (list, tuple)) or len(values) > 4 or not all(type(name) is str for name in values):
        raise Refused("a set in it is made from more than a few names")
    return set(values)


def _dtype(kind: Any, *_: Any) -> Record:
    if not isinstance(kind, str) or len(kind) > MAX_NAME:
        raise Refused("a type of numpy's in it has no name")
    return Record(kind)


def _device(kind: Any, index: Any = 0) -> Record:
    return Record("torch.device", (kind, index))


def _size(sizes: Any = ()) -> tuple:
    if not isinstance(sizes, tuple):
        raise Refused("a size in it is no tuple")
    return sizes


def _instance(cls: Any, base: Any, state: Any) -> Record:
    if not isinstance(cls, Ref) or base not in OBJECT or state is not None:
        raise Refused("an object in it is made from arguments")
    return Record(str(cls))


_CALLS = {
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "collections.OrderedDict": _empty(dict),
    "dnnlib.util.EasyDict": _empty(dict),
    "builtins.set": _names,
    "__builtin__.set": _names,
    "copyreg._reconstructor": _instance,
    "copy_reg._reconstructor": _instance,
}
# Held as values, never called: torch's layers, number types and storages, the solvers that AMED's loss remembers.
_NAMES = re.compile(
    r"torch\.nn\.modules\.\w+\.\w+|torch\.(bool|u?int\d+|b?float\d+)|torch\.\w+Storage|torch\.storage\.TypedStorage"
    r"|solvers(_amed)?\.\w+_sampler|(builtins|__builtin__)\.object"
)
