"""Triton kernels without a GPU: run by the interpreter in a process of their own, compiled for three architectures."""

import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which the interpreter does not", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from amed_engine.kernels import triton_combine, triton_midpoint  # noqa: E402
from amed_engine.kernels.reference import frequency_values  # noqa: E402

HERE = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNED = [["tt.divisibility", 16]]
ARCHITECTURES = [80, 90, 100]


@pytest.mark.slow
def test_every_property_holds_under_the_interpreter():
    """The flag is read when a kernel is defined, hence the other process."""
    files = [str(HERE / name) for name in ("test_combine.py", "test_midpoint.py", "test_fuzz.py", "test_mutants.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 70


def build(kernel, architecture, signature, constants, attributes):
    """(PTX, machine code, resource usage) of a kernel for a GPU that need not be there."""
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": triton_combine.NUM_WARPS, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    return compiled.asm["ptx"], sass, {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


def build_combine(architecture, rows, count, state, other):
    names = ["sources", "source_strides", "outputs", "output_strides"]
    types = [(state,) + (other,) * (count - 1), ("i32",) * count, (state,) * rows, ("i32",) * rows]
    signature = {**dict(zip(names, types, strict=True)), "coeffs": "*fp32", "size": "i32"}
    signature |= {"stride_m": "i32", "stride_j": "i32", "stride_b": "i32", "BLOCK": "constexpr", "ACC": "constexpr"}
    order = list(inspect.signature(triton_combine.combine_kernel.fn).parameters)
    attributes = {(i, k): ALIGNED for i, kinds in enumerate(types) for k in range(len(kinds))}
    attributes[(order.index("size"),)] = ALIGNED
    constants = {"BLOCK": triton_combine.BLOCK, "ACC": tl.float32}
    return build(
        triton_combine.combine_kernel, architecture, {name: signature[name] for name in order}, constants, attributes
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("rows", "count", "state", "other"),
    [
        (1, 3, "*fp32", "*fp32"),
        (2, 5, "*fp32", "*bf16"),
        (2, 5, "*fp16", "*fp16"),
        (3, 8, "*fp32", "*fp32"),
        (8, 16, "*fp32", "*fp32"),
    ],
)
def test_combine_compiles_to_wide_loads_without_spills(architecture, rows, count, state, other):
    ptx, sass, usage = build_combine(architecture, rows, count, state, other)
    assert usage["STACK"] == usage["LOCAL"] == 0, "spilled"
    if rows <= 3:  # what solvers need; the largest program may take what a thread has (168 to 176, by version)
        assert usage["REG"] <= 72
    assert ".f64" not in ptx, "a number became float64"
    # 1024 elements by 128 threads: two 16-byte loads of float32 each, one of a half type.
    widths = {"*fp32": 2, "*fp16": 1, "*bf16": 1}
    assert sass.count("LDG.E.128") == widths[state] + (count - 1) * widths[other]
    assert sass.count("STG.E.128") == rows * widths[state]
    assert not re.search(r"LDG\.E\.(U16|64)", sass), "a narrow load of an aligned source"
    assert not re.search(r"(mul|add)\.f32", ptx), "every product is one explicit fma"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("size", "heads"), [(8, (0.01, 0.0)), (32, (0.05, 0.2)), (5, (0.0, 0.2))])
def test_midpoint_compiles_without_spills(architecture, size, heads):
    pixels = size * size
    padded = triton.next_power_of_2(pixels)
    constants = {
        **{"PIXELS": pixels, "P": padded, "HIDDEN": 128, "ENCODED": 4, "K": 4, "NOISE": 8, "E": 8},
        **{"ROWS": triton_midpoint.TILE // padded, "ACC": tl.float32, "CHANNELS": 256},
        **{"FREQUENCIES": frequency_values(8), "SCALE_DIR": heads[0], "SCALE_TIME": heads[1]},
    }
    integers = {"batch_stride", "channel_stride", "sigma_stride", "sigma_next_stride", "batch"}
    names = list(inspect.signature(triton_midpoint.midpoint_kernel.fn).parameters)
    signature = {n: "constexpr" if n in constants else "i32" if n in integers else "*fp32" for n in names}
    aligned = {"batch_stride", "channel_stride"} if pixels % 16 == 0 else set()
    attributes = {(i,): ALIGNED for i, n in enumerate(names) if n in aligned or signature[n] == "*fp32"}
    ptx, sass, usage = build(triton_midpoint.midpoint_kernel, architecture, signature, constants, attributes)
    assert usage["STACK"] == usage["LOCAL"] == 0, "spilled"
    assert usage["REG"] <= 128
    assert ".f64" not in ptx, "a number became float64"
    if aligned:
        assert sass.count("LDG.E.128") >= 16, "features and weights are read 16 bytes at a time"


STAND_IN = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    class launcher_cls: pass
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
from amed_engine.kernels import MidpointWeights, triton_backend

built, run = [], JITFunction.run
def compile_only(self, *args, grid, warmup, **options):
    built.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options).asm["ptx"]))
JITFunction.run = compile_only

x, d = torch.randn(3, 3, 64, 64), torch.randn(3, 3, 64, 64).bfloat16()
triton_backend.combine_into([x, d, x], torch.randn(2, 3, 3), [torch.empty_like(x) for _ in range(2)])
triton_backend.coeff_grad_into([x], [d], torch.empty(1, 1, 3))
shapes = [(8, 8), (8,), (128, 64), (128,), (4, 128), (4,), (1, 20), (1,), (1, 20), (1,)]
weights = MidpointWeights(*(torch.ones(shape) for shape in shapes))
triton_backend.midpoint_into(
    torch.randn(3, 256, 8, 8), torch.ones(3), torch.ones(1), weights, 0.01, 0.0, torch.empty(10, 3)
)
for name, ptx in built:
    print(name, ptx.count("ld.global.v4"), ".f64" in ptx)
built.clear()

# What Triton specializes on: a size, a stride or a count of one becomes a constant of its own type.
single, half, double = torch.float32, torch.float16, torch.float64
for shape, dtype in [((1, 1, 1, 1), single), ((5, 1), single), ((1, 3, 5, 5), half), ((1, 1), double)]:
    x, acc = torch.ones(shape, dtype=dtype), torch.promote_types(dtype, torch.float32)
    triton_backend.combine_into([x, x], torch.ones(1, 2, 1, dtype=acc), [torch.empty_like(x)])
    triton_backend.coeff_grad_into([x], [x], torch.empty(1, 1, len(x), dtype=acc))
cases = [
    (1, 1, 1, single, (0.0, 0.0)),
    (1, 256, 2, single, (0.05, 0.2)),
    (2, 0, 1, double, (0.0, 0.2)),
]
for side, channels, batch, dtype, scales in cases:
    shapes[2] = (128, side**2)
    weights = MidpointWeights(*(torch.ones(shape, dtype=dtype) for shape in [*shapes, (1, 20), (1,)]))
    features = torch.ones(batch, channels, side, side) if channels else None
    sigma = torch.ones(batch, dtype=dtype)
    triton_backend.midpoint_into(features, sigma, sigma[:1], weights, *scales, sigma.new_empty(10, batch))
print("odd", len(built))
"""


def test_launchers_specialize_without_a_device():
    """Through the real launch path up to the launch: pointers and strides in tuples count as aligned, loads are wide."""
    run = subprocess.run([sys.executable, "-c", STAND_IN], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr[-3000:]
    *lines, odd = [line.split() for line in run.stdout.splitlines()]
    assert odd == ["odd", "11"]
    assert [line[0] for line in lines] == ["combine_kernel", "dot_kernel", "midpoint_kernel"]
    # Two float32 sources of two loads each and one bfloat16 source of one.
    assert int(lines[0][1]) == 5
    assert all(int(line[1]) > 0 and line[2] == "False" for line in lines)
