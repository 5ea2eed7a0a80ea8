"""`combine` gives Σ_j coeffs[m, j, b] · sources[j][b] in every implementation, dtype, shape and memory order."""

import itertools
import os

import pytest
import torch

from amed_engine import kernels
from amed_engine.kernels import combine, combine_coeff_grad, ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BATCHES, CHANNELS, SIZES = [1, 3, 19, 64, 99, 257], [1, 3, 4], [5, 8, 31, 32, 64]
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = [(F32,), (F32, BF16), (F16,), (BF16,), (F64, F32), (BF16, F32), (F32, F16, F32), (F64,)]
LAYOUTS = [
    ("contiguous",),
    ("channels_last",),
    ("batch_last",),
    ("sliced",),
    ("offset",),
    ("contiguous", "channels_last", "cropped", "batch_last"),
]
NAN = float("nan")


@pytest.mark.parametrize("batch", BATCHES)
def test_every_shape_in_float32(device, batch, make_case, assert_matches):
    pairs = list(enumerate(itertools.product(CHANNELS, SIZES)))
    if INTERPRETED and batch != 3:  # milliseconds for each thousand elements
        pairs = pairs[:1]
    # The slow part is the answer in float64; plain torch is the definition and gets every fourth shape.
    for k, (channels, size) in pairs[:: 4 if kernels.backends()["cpu"] == "reference" else 1]:
        rows, count = [(1, 2), (1, 3), (2, 4)][k % 3]
        case = make_case((batch, channels, size, size), (F32,), rows, count, k, device, shared=k % 2 == 0)
        assert_matches(combine(case.sources, case.coeffs), case)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "+".join(str(d).removeprefix("torch.") for d in dtypes))
def test_every_dtype_and_layout(device, dtypes, layouts, make_case, assert_matches):
    """Shapes are drawn so that all of them meet some dtype and layout; what lies between the samples is NaN."""
    pairs = list(itertools.product(CHANNELS, SIZES))
    start = DTYPES.index(dtypes) * len(LAYOUTS) + LAYOUTS.index(layouts)
    for step in range(1 if INTERPRETED else 2):
        channels, size = pairs[(start * 2 + step) % len(pairs)]
        case = make_case((3, channels, size, size), dtypes, 2, 3, start, device, layouts)
        outputs = combine(case.sources, case.coeffs)
        assert_matches(outputs, case)
        assert all(out.stride() == torch.empty_like(case.sources[0]).stride() for out in outputs)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (8, 16), (3, 8), (5, 9), (8, 1)])
def test_the_largest_and_smallest_programs(device, rows, count, make_case, assert_matches):
    for dtypes in ((F32,), (F64,), (F16,)):
        case = make_case((2, 3, 7, 8), dtypes, rows, count, rows * 16 + count, device)
        assert_matches(combine(case.sources, case.coeffs), case)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1030), (2, 3, 4, 5, 6), (0, 3, 8, 8), (3, 0)])
def test_any_rank_and_empty_tensors(device, shape, make_case):
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
    coeffs = torch.tensor([[[0.5], [-2.0]]], device=device)
    (out,) = combine(sources, coeffs)
    assert out.shape == torch.Size(shape)
    torch.testing.assert_close(out, 0.5 * sources[0] - 2 * sources[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_last", "sliced", "cropped", "offset"])
def test_outputs_are_written_in_full_whatever_they_held(device, layout, make_case, assert_matches):
    case = make_case((3, 3, 9, 8), (F32, BF16), 2, 3, 1, device)
    targets = make_case((3, 3, 9, 8), (F32,), 1, 2, 2, device, (layout,)).sources
    for target in targets:
        target.fill_(NAN)
    returned = combine(case.sources, case.coeffs, out=targets)
    assert all(a is b for a, b in zip(returned, targets, strict=True))
    assert_matches(targets, case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_an_output_may_be_a_source(device, layout, make_case, assert_matches):
    case = make_case((5, 3, 9, 8), (F32,), 2, 3, 3, device, (layout,))
    combine(case.sources, case.coeffs, out=[case.sources[1], case.sources[0]])
    assert_matches([case.sources[1], case.sources[0]], case)


def test_sources_are_left_alone(device, make_case):
    case = make_case((3, 3, 8, 8), (F32, BF16), 2, 3, 4, device)
    before = [source.clone() for source in case.sources]
    combine(case.sources, case.coeffs)
    assert all(torch.equal(a, b) for a, b in zip(before, case.sources, strict=True))


def test_shared_coefficients_in_any_form(device, make_case):
    """(M, J, 1), the same expanded with stride 0, and the same copied out are one thing."""
    case = make_case((6, 3, 8, 8), (F32,), 2, 3, 5, device, shared=True)
    expanded = case.coeffs.expand(2, 3, 6)
    transposed = case.coeffs.transpose(0, 1).contiguous().transpose(0, 1)
    results = [combine(case.sources, c) for c in (case.coeffs, expanded, expanded.contiguous(), transposed)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_bitwise_repeatable_and_independent_of_the_batch(device, dtype, make_case):
    shape = (3, 3, 5, 7) if INTERPRETED else (37, 3, 61, 67)
    case = make_case(shape, (dtype,), 2, 5, 6, device)
    first, second = combine(case.sources, case.coeffs), combine(case.sources, case.coeffs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for b in (0, shape[0] - 1):
        alone = combine([source[b : b + 1] for source in case.sources], case.coeffs[:, :, b : b + 1])
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(first, alone, strict=True))


def test_bitwise_independent_of_threads(device, make_case):
    if device.type != "cpu" or INTERPRETED:
        pytest.skip("threads are the CPU's")
    case = make_case((40, 3, 64, 64), (F32,), 2, 5, 7, device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(combine(case.sources, case.coeffs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtypes", [(F32,), (F64,), (BF16, F32)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_coeff_grad_is_the_per_sample_dot_product(device, dtypes, layout, make_case):
    case = make_case((4, 3, 19, 8), dtypes, 2, 5, 8, device, (layout,))
    grads, sources = case.sources[:2], case.sources[2:]
    result = combine_coeff_grad(grads, sources)
    left, right = (torch.stack([t.cpu().double().flatten(1) for t in group]) for group in (grads, sources))
    truth = torch.einsum("mbn,jbn->mjb", left, right)
    assert result.dtype == (F64 if dtypes[0] == F64 else F32)
    # The sum has 456 terms of size one.
    torch.testing.assert_close(result.cpu().double(), truth, rtol=1e-5, atol=1e-12 if dtypes[0] == F64 else 3e-4)
    assert torch.equal(result, combine_coeff_grad(grads, sources))


def test_a_coefficient_off_by_a_thousandth_is_noticed(device, make_case, assert_matches):
    """The comparison has teeth: the same call with one coefficient moved by 1e-3 fails it."""
    for dtype in (F32,) if INTERPRETED else (F32, F64, F16):
        for m, j in itertools.product(range(2), range(3)):
            case = make_case((3, 3, 8, 8), (dtype,), 2, 3, 9, device)
            wrong = case.coeffs.clone()
            wrong[m, j, 1] += 1e-3
            assert_matches(combine(case.sources, case.coeffs), case)
            with pytest.raises(AssertionError, match="not close"):
                assert_matches(combine(case.sources, wrong), case)


def test_offsets_beyond_two_to_the_31(device, make_case, assert_matches, monkeypatch):
    """Samples lie more than 2^31 elements apart; the memory between them is reserved and never touched."""
    if device.type != "cpu":
        pytest.skip("a GPU has no memory to spare; the test below fills it")
    case, apart = make_case((2, 3, 4, 5), (F16,), 1, 2, 10, device), 2**31 + 8
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        buffers = [torch.empty(apart + 64, dtype=F16) for _ in range(2)]
    except RuntimeError as error:
        pytest.skip(f"no 8 GiB of address space: {error}")
    far = [buffer.as_strided((2, 3, 4, 5), (apart, 20, 5, 1)) for buffer in buffers]
    for view, source in zip(far, case.sources, strict=True):
        view.copy_(source)
    dots = combine_coeff_grad(far, far)
    stacked = torch.stack(case.sources).double().flatten(2)
    torch.testing.assert_close(dots.double(), torch.einsum("mbn,jbn->mjb", stacked, stacked), rtol=1e-5, atol=1e-5)
    combine(far, case.coeffs, out=far[1:])
    assert_matches(far[1:], case)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_more_than_two_to_the_31_elements(name):
    """Offsets are 64-bit: rows on either side of the boundary are right."""
    if reason := ops._why_not(name):
        pytest.skip(reason)
    batch, size = 175_000, 12_288  # 2.15e9 elements of float16
    needed = 3 * batch * size * 2 + (1 << 30)
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory, got {free / 2**30:.0f}")
    row = torch.randn(size, device="cuda", dtype=F16)
    source = row.expand(batch, size).contiguous()
    scale = torch.linspace(-1, 1, batch, device="cuda").view(1, 1, batch)
    with kernels.use(name):
        (out,) = combine([source], scale)
    for b in (0, 2**31 // size - 1, 2**31 // size, 2**31 // size + 1, batch - 1):
        expected = scale[0, 0, b].double() * row.double()
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-3, atol=1e-3)
