"""`combine` is a well-formed torch operator: gradients, compile, export, trace; and the choice of implementation."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from amed_engine import kernels
from amed_engine.kernels import combine, combine_coeff_grad, native, ops

ROOT = Path(__file__).resolve().parents[2]


class Update(nn.Module):
    def forward(self, x, y, coeffs):
        first, second = combine([x, y], coeffs)
        return first.relu() + second


def inputs(batch=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(batch, 3, 8, 8, generator=generator, dtype=dtype) for _ in range(2))
    return x, y, torch.randn(2, 2, batch, generator=generator, dtype=dtype)


# ---- gradients ----


@pytest.mark.parametrize("name", ["default", "reference"])
@pytest.mark.parametrize(("rows", "count"), [(1, 2), (2, 3), (3, 16)])
def test_gradcheck(rows, count, name):
    """First and second derivatives, for coefficients of each sample and for shared ones."""
    generator = torch.Generator().manual_seed(1)
    sources = [
        torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(count)
    ]
    for batch in (2, 1):
        coeffs = torch.randn(rows, count, batch, generator=generator, dtype=torch.float64, requires_grad=True)
        with kernels.use("reference") if name == "reference" else nullcontext():
            assert torch.autograd.gradcheck(lambda c, *s: tuple(combine(s, c)), (coeffs, *sources))
            if count < 16:
                assert torch.autograd.gradgradcheck(lambda c, *s: tuple(combine(s, c)), (coeffs, *sources))


def test_only_what_is_asked_for_gets_a_gradient():
    x, y, coeffs = inputs()
    x.requires_grad_()
    first, _ = combine([x, y], coeffs)
    first.sum().backward()
    assert torch.allclose(x.grad, coeffs[0, 0].view(-1, 1, 1, 1).expand_as(x))
    assert y.grad is None
    assert coeffs.grad is None


def test_gradients_of_mixed_dtypes_have_the_dtype_of_their_tensor():
    x, y, coeffs = inputs()
    y = y.bfloat16()
    tensors = [t.requires_grad_() for t in (x, y, coeffs)]
    sum(out.square().sum() for out in combine([x, y], coeffs)).backward()
    got = [t.grad for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    sum(out.square().sum() for out in combine(wide[:2], wide[2])).backward()
    for tensor, grad, truth in zip(tensors, got, wide, strict=True):
        assert grad.dtype == tensor.dtype
        assert grad.shape == tensor.shape
        torch.testing.assert_close(grad.double(), truth.grad, rtol=1e-2, atol=2e-2)


def test_expanded_coefficients_sum_their_gradient():
    x, y, _ = inputs(dtype=torch.float64)
    small = torch.randn(1, 2, 1, dtype=torch.float64, requires_grad=True)
    (by_expand,) = torch.autograd.grad(combine([x, y], small.expand(1, 2, 4))[0].sum(), small)
    (by_sharing,) = torch.autograd.grad(combine([x, y], small)[0].sum(), small)
    torch.testing.assert_close(by_expand, by_sharing)
    torch.testing.assert_close(by_sharing.flatten(), torch.stack([x.sum(), y.sum()]))


# ---- compile, export, trace ----


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, y, coeffs = (t.requires_grad_(grad) for t in inputs())
    torch.library.opcheck(torch.ops.amed.combine.default, ([x, y.bfloat16(), x], torch.randn(2, 3, 4)))
    torch.library.opcheck(torch.ops.amed.combine.default, ([x, y], coeffs))
    torch.library.opcheck(
        torch.ops.amed.combine.default,
        ([x.to(memory_format=torch.channels_last), y[:, :, ::2].repeat(1, 1, 2, 1)], coeffs[..., :1]),
    )
    torch.library.opcheck(torch.ops.amed.combine_coeff_grad.default, ([x], [x, y]))
    if not grad:
        out = [torch.empty_like(x), torch.empty_like(x)]
        torch.library.opcheck(torch.ops.amed.combine_out.default, ([x, y], coeffs, out))


def test_compile_without_a_graph_break():
    torch._dynamo.reset()
    module, compiled = Update(), torch.compile(Update(), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 7, 2):
        x, y, coeffs = inputs(batch)
        x.requires_grad_()
        torch.testing.assert_close(compiled(x, y, coeffs), module(x, y, coeffs))
        (got,) = torch.autograd.grad(compiled(x, y, coeffs).sum(), x)
        (wanted,) = torch.autograd.grad(module(x, y, coeffs).sum(), x)
        torch.testing.assert_close(got, wanted)


def test_compile_with_out():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, y, coeffs, buffer):
        combine([x, y], coeffs, out=[buffer, x])
        return x + buffer

    x, y, coeffs = inputs()
    first, second = combine([x, y], coeffs)
    torch.testing.assert_close(step(x, y, coeffs, torch.empty_like(x)), first + second)


def export(module, *arguments):
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch}, {0: batch}, {2: batch})
    return torch.export.export(module, arguments, dynamic_shapes=shapes)


def targets(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("form", ["operator", "decomposed", "plain"])
def test_export_with_a_dynamic_batch(form):
    """As one opaque operator, with it decomposed afterwards, and with plain torch from the start."""
    with kernels.use("reference" if form == "plain" else "native" if native.available() else "reference"):
        program = export(Update(), *inputs())
    if form == "decomposed":
        table = {**torch.export.default_decompositions(), **kernels.decompositions()}
        program = program.run_decompositions(table)
    has_operator = any("amed" in target for target in targets(program))
    assert has_operator == (form == "operator" and native.available())
    for batch in (1, 4, 9):
        torch.testing.assert_close(program.module()(*inputs(batch)), Update()(*inputs(batch)))


def test_jit_trace_serves_other_batches():
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit.trace"):
        traced = torch.jit.trace(Update(), inputs())
    torch.testing.assert_close(traced(*inputs(7)), Update()(*inputs(7)))


def test_trace_of_plain_torch_needs_nothing_of_this_package(tmp_path):
    with kernels.use("reference"), pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit.trace"):
        torch.jit.save(torch.jit.trace(Update(), inputs()), tmp_path / "update.pt")
    program = "import sys, torch; torch.jit.load(sys.argv[1]); assert 'amed_engine' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "update.pt")], check=True)


# ---- which implementation ----


def test_backends_names_what_runs():
    names = kernels.backends()
    assert names == {"cpu": "native" if native.available() else "reference", "cuda": names["cuda"]}
    with kernels.use("reference"):
        assert kernels.backends() == {"cpu": "reference", "cuda": "reference"}
    assert kernels.backends() == names


def test_use_is_undone_after_an_error():
    names = kernels.backends()
    with pytest.raises(KeyError), kernels.use("reference"):
        raise KeyError
    assert kernels.backends() == names


def test_unknown_implementation():
    with (
        pytest.raises(ValueError, match="must be one of reference, native, triton, cuda, got 'gpu'"),
        kernels.use("gpu"),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_implementation_that_is_not_there():
    with (
        pytest.raises(ValueError, match=r"'cuda' cannot be used: .*(CuPy is there|no CUDA device)"),
        kernels.use("cuda"),
    ):
        pass


def test_everything_works_without_the_extension():
    """In a fresh process where importing it fails, as on a machine without a compiler."""
    program = """
import sys
sys.modules["amed_engine._native"] = None
import torch
from amed_engine import kernels
assert kernels.backends()["cpu"] == "reference", kernels.backends()
x = torch.ones(2, 3)
(out,) = kernels.combine([x, x], torch.full((1, 2, 1), 0.25))
assert torch.equal(out, x / 2)
assert "halted" in kernels.native.why_not() or "None" in kernels.native.why_not(), kernels.native.why_not()
try:
    with kernels.use("native"):
        pass
except ValueError as error:
    assert "'native' cannot be used" in str(error)
else:
    raise AssertionError("use('native') did not raise")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


def test_importing_the_kernels_leaves_triton_alone():
    program = "import sys, amed_engine.kernels; assert 'amed_engine.kernels.triton_combine' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


def test_bare_import_from_a_checkout_says_what_is_wrong():
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "from amed_engine import kernels" in run.stderr


def test_coeff_grad_operator_has_its_own_gradient():
    grads = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    sources = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(*tensors):
        return combine_coeff_grad(tensors[:2], tensors[2:])

    assert torch.autograd.gradcheck(call, (*grads, *sources))


def test_gradients_take_nothing_from_the_host():
    """On pretended CUDA tensors, where torch refuses to mix devices; the formula alone, since autograd wants a real one."""
    from types import SimpleNamespace

    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        x, y, grad = (torch.empty(4, 3, 8, 8, device="cuda") for _ in range(3))
        coeffs = torch.empty(3, 2, 4, device="cuda")
        saved = SimpleNamespace(saved_tensors=(coeffs, x, y), needs_input_grad=([True, True], True))
        grad_sources, grad_coeffs = ops._combine_backward(saved, [grad, None, grad])
    assert [g.device.type for g in (*grad_sources, grad_coeffs)] == ["cuda"] * 3
    assert grad_coeffs.shape == coeffs.shape
