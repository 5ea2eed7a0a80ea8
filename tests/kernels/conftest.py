"""Implementations under test, and problems with answers that no implementation computed.

With TRITON_INTERPRET=1 the only implementation is Triton's interpreter on the CPU: `test_triton.py` runs the other
files so in a process of its own, on fewer shapes.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from amed_engine import kernels
from amed_engine.kernels import cuda, native, ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# (rtol, atol) for each output dtype, against float64.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1e-2),
}
# emulated: the CUDA C++ sources, compiled for the CPU by csrc/tests/emulated.
CPU = ["triton"] if INTERPRETED else ["reference", "native", "emulated"]
GPU = [] if INTERPRETED else [pytest.param(name, marks=pytest.mark.gpu) for name in ("gpu-triton", "gpu-cuda")]


class Case(NamedTuple):
    sources: list[Tensor]
    coeffs: Tensor
    truth: Tensor  # (M, B, ...) float64, on the CPU


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty hands out holds NaN, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=[*CPU, *GPU])
def device(request, monkeypatch, poisoned) -> Iterator[torch.device]:
    """Where to put the tensors, with one implementation forced."""
    name = request.param.removeprefix("gpu-")
    if name == "native" and not native.available():
        pytest.skip(f"no compiled extension: {native.why_not()}")
    if name == "triton":
        pytest.importorskip("triton")
    if INTERPRETED:
        monkeypatch.setitem(ops._DEVICES, "triton", "cpu")
    if name == "cuda" and cuda.why_not():
        pytest.skip(cuda.why_not())
    if name == "emulated":
        name = request.getfixturevalue("on_host")
    with kernels.use(name):
        yield torch.device("cuda" if "gpu-" in request.param else "cpu")


@pytest.fixture
def on_host(emulated, monkeypatch) -> str:
    """`use("cuda")` runs the emulated kernels on tensors of the CPU."""

    def launch(name: str, args: ctypes.Structure, device: torch.device) -> None:
        assert device.type == "cpu"
        assert getattr(emulated, f"amed_cuda_{name}")(ctypes.byref(args), None) == 0

    monkeypatch.setattr(cuda, "why_not", str)
    monkeypatch.setitem(ops._DEVICES, "cuda", "cpu")
    monkeypatch.setattr(cuda, "_launch", launch)
    return "cuda"


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory order; what is not theirs is NaN."""
    batch, channels, height, width = values.shape
    if layout == "batch_last":
        # Dense, but of no order inside a sample that kernels know: strides of the batch are the smallest.
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every second sample, the first channels of more
        base = values.new_full((2 * batch, channels + 2, height, width), float("nan"))
        view = base[::2, :channels]
    elif layout == "cropped":  # samples that are not dense
        view = values.new_full((batch, channels, height, width + 3), float("nan"))[..., 1 : width + 1]
    elif layout == "offset":  # an address that is not a multiple of 16 bytes
        view = values.new_full((values.numel() + 1,), float("nan"))[1:].view(values.shape)
    else:
        return values.contiguous()
    return view.copy_(values)


@pytest.fixture(scope="session")
def make_case():
    def make(
        shape: Sequence[int],
        dtypes: Sequence[torch.dtype],
        rows: int,
        count: int,
        seed: int,
        device: torch.device,
        layouts: Sequence[str] = ("contiguous",),
        shared: bool = False,
    ) -> Case:
        """Normal numbers; the answer is one matrix product in float64 of the numbers as stored."""
        generator = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtypes[0] == torch.float64 else torch.float32
        sources = [
            lay_out(torch.randn(shape, generator=generator).to(dtypes[j % len(dtypes)]), layouts[j % len(layouts)])
            for j in range(count)
        ]
        coeffs = torch.randn(rows, count, 1 if shared else shape[0], generator=generator, dtype=wide)
        stacked = torch.stack([source.double().contiguous().flatten(1) for source in sources])  # (J, B, N)
        per_sample = coeffs.double().expand(-1, -1, shape[0]).permute(2, 0, 1)  # (B, M, J)
        truth = torch.bmm(per_sample, stacked.transpose(0, 1)).transpose(0, 1)
        # Moved as one storage each, so that strides and offsets survive.
        moved = [_move(source, device) for source in sources]
        return Case(moved, coeffs.to(device), truth.reshape(rows, *shape))

    return make


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    flat = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return torch.as_strided(flat.to(device), tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.fixture(scope="session")
def assert_matches():
    def check(outputs: Sequence[Tensor], case: Case) -> None:
        """Every output has the right dtype and shape and is the true value to within its dtype's tolerance."""
        assert len(outputs) == case.truth.shape[0]
        rtol, atol = TOLERANCES[case.sources[0].dtype]
        for output, truth in zip(outputs, case.truth, strict=True):
            assert output.dtype == case.sources[0].dtype
            torch.testing.assert_close(output.cpu().double(), truth, rtol=rtol, atol=atol)

    return check
