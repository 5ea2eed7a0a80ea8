"""`Sampler.run` speaks DLPack: arrays of other libraries go in and come out in their own memory, without a copy."""

import types

import numpy as np
import pytest
import torch

from amed_engine import ConfigError, Sampler
from amed_engine.engine.arrays import delivered, imported

SHAPE = (1, 8, 8)


class Array:
    """An array of a library that nobody knows: the DLPack protocol and nothing else."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.streams = tensor, []

    def __dlpack__(self, *, stream=None, **_):
        self.streams.append(stream)
        return self.tensor.__dlpack__()

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class StandardArray(Array):
    """One whose library follows the array API, as JAX and CuPy do: it tells its namespace."""

    def __array_namespace__(self, **_):
        return types.SimpleNamespace(from_dlpack=lambda array: StandardArray(torch.from_dlpack(array)))


@pytest.fixture
def sampler(gaussian_denoiser) -> Sampler:
    return Sampler(gaussian_denoiser, solver="ipndm", nfe=4, shape=SHAPE)


@pytest.fixture
def conditional(gaussian_denoiser) -> Sampler:
    def denoise(x, sigma, labels):
        return gaussian_denoiser(x + labels[:, :1, None, None], sigma)

    return Sampler(denoise, solver="ipndm", nfe=4, shape=SHAPE, label_dim=3)


def latents(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [torch.Tensor.numpy, Array, StandardArray], ids=["numpy", "bare", "standard"])
def test_latents_of_any_library_are_latents(sampler, kind):
    given = kind(latents())
    assert torch.equal(sampler.run(given).images, sampler.run(latents()).images)


def test_latents_are_read_in_place():
    tensor, array = latents(), np.ones((2, 3), np.float32)
    assert imported("batch", Array(tensor)).data_ptr() == tensor.data_ptr()
    assert imported("batch", array).data_ptr() == array.ctypes.data
    assert imported("batch", tensor) is tensor


def test_the_producer_is_told_no_stream_on_the_cpu(sampler):
    """A stream is a matter of GPUs; on the CPU the protocol wants None."""
    given = Array(latents())
    sampler.run(given)
    assert given.streams == [None]


def test_seeds_and_labels_may_be_arrays(conditional):
    expected = conditional.run([5, 6, 7], [2, 0, 1])
    for kind in (torch.Tensor.numpy, Array):
        result = conditional.run(kind(torch.tensor([5, 6, 7])), kind(torch.tensor([2, 0, 1])))
        assert torch.equal(result.images, expected.images)
        assert result.seeds == [5, 6, 7]
    vectors = torch.eye(3)[[2, 0, 1]]
    assert torch.equal(conditional.run([5, 6, 7], vectors.numpy()).images, expected.images)


def test_numpy_in_numpy_out(sampler):
    images = sampler.run(latents().numpy(), output_type="dlpack").images
    assert type(images) is np.ndarray
    assert (images == sampler.run(latents()).images.numpy()).all()


def test_a_library_gets_its_own_kind_back(sampler):
    images = sampler.run(StandardArray(latents()), output_type="dlpack").images
    assert type(images) is StandardArray
    assert torch.equal(images.tensor, sampler.run(latents()).images)


@pytest.mark.parametrize("batch", [[1, 2], 2, latents(2), Array(latents(2))], ids=["seeds", "number", "tensor", "bare"])
def test_where_the_latents_name_no_library_it_is_a_tensor_that_speaks_dlpack(sampler, batch):
    images = sampler.run(batch, output_type="dlpack").images
    assert type(images) is torch.Tensor
    assert np.from_dlpack(images).ctypes.data == images.data_ptr()


@pytest.mark.parametrize("like", [np.zeros(1), StandardArray(torch.zeros(1))], ids=["numpy", "standard"])
def test_nothing_is_copied_on_the_way_out(like):
    images = latents()
    out = delivered(images, "dlpack", like)
    assert (out.ctypes.data if isinstance(out, np.ndarray) else out.tensor.data_ptr()) == images.data_ptr()
    assert delivered(images, "numpy", None).ctypes.data == images.data_ptr()
    assert delivered(images, "torch", like) is images


def test_numpy_is_numpy_whatever_came_in(sampler):
    images = sampler.run([1, 2], output_type="numpy").images
    assert type(images) is np.ndarray
    assert (images == sampler.run([1, 2]).images.numpy()).all()
    images[:] = 0  # the caller's own, to write to


def test_out_may_be_an_array(sampler):
    out = np.full((3, *SHAPE), np.nan, np.float32)
    result = sampler.run(latents().numpy(), out=out, output_type="dlpack")
    assert (out == sampler.run(latents()).images.numpy()).all()
    assert result.images.ctypes.data == out.ctypes.data


def test_arrays_that_must_not_be_written_to_are_read_but_not_written(sampler):
    """DLPack hands both out alike: the refusal is this package's own."""
    given = latents().numpy()
    given.flags.writeable = False
    assert (sampler.run(given, output_type="numpy").images == sampler.run(latents()).images.numpy()).all()
    other = type("ArrayImpl", (Array,), {"__module__": "jaxlib._jax"})(torch.zeros(3, *SHAPE))
    for out in (given, np.broadcast_to(np.float32(0), given.shape), other):
        with pytest.raises(ConfigError, match=r"out is written to, and this .* is read-only"):
            sampler.run(latents(), out=out)
    assert (given == latents().numpy()).all()
    assert float(other.tensor.abs().max()) == 0


def test_strided_arrays_are_arrays(sampler):
    """In any order of memory, and `out` a part of a larger array whose rest stays as it is."""
    expected, out = sampler.run(latents()).images.numpy(), np.zeros((6, *SHAPE), np.float32)
    for given in (np.asfortranarray(latents().numpy()), np.repeat(latents().numpy(), 2, axis=0)[::2]):
        assert not given.flags.c_contiguous
        assert (sampler.run(given, out=out[::2], output_type="numpy").images == expected).all()
    assert (out[::2] == expected).all()
    assert not out[1::2].any()


def test_a_number_of_samples_may_be_numpy_s(sampler):
    assert len(sampler.run(np.int64(3)).images) == 3


def test_jax_in_jax_out_in_place(sampler):
    """With JAX itself, where it is installed."""
    jax = pytest.importorskip("jax")
    given = jax.numpy.asarray(latents().numpy())
    assert imported("batch", given).data_ptr() == given.unsafe_buffer_pointer()
    images = sampler.run(given, output_type="dlpack").images
    assert isinstance(images, jax.Array)
    assert (np.asarray(images) == sampler.run(latents()).images.numpy()).all()
    tensor = latents()
    assert delivered(tensor, "dlpack", given).unsafe_buffer_pointer() == tensor.data_ptr()
    with pytest.raises(ConfigError, match="read-only"):
        sampler.run(given, out=given)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((2, *SHAPE), np.float32)[::-1], "batch: torch has no tensors of negative strides, .* pass a copy"),
        (np.zeros((2, *SHAPE), ">f4"), "batch: this ndarray cannot be read through DLPack: .*byte order"),
        (np.zeros((2, *SHAPE), np.float16), "latents must be torch.float32, .* got torch.float16"),
        (np.zeros((2, *SHAPE), np.int64), "batch must be a number of samples, a sequence of seeds or a float tensor"),
        (np.zeros((2, *SHAPE)), "latents must be torch.float32, the sampler's dtype, got torch.float64"),
        (np.zeros((2, 8, 8), np.float32), "latents must have shape"),
        (np.array(["a", "b"]), "batch: this ndarray cannot be read through DLPack"),
        (np.array([object()]), "batch: this ndarray cannot be read through DLPack"),
        (np.array([-1, 2]), "seed -1 is outside"),
        (np.array(3), "batch must be a number of samples"),
    ],
)
def test_what_an_array_cannot_be_is_said(sampler, batch, message):
    with pytest.raises(ConfigError, match=message):
        sampler.run(batch)


def test_an_unknown_output_type_is_refused_before_sampling(gaussian_denoiser):
    calls = []
    sampler = Sampler(lambda x, sigma: calls.append(1) or gaussian_denoiser(x, sigma), solver="euler", shape=SHAPE)
    with pytest.raises(ConfigError, match="output_type must be one of torch, numpy, dlpack; got 'pil'"):
        sampler.run(2, output_type="pil")
    assert calls == []


@pytest.mark.gpu
def test_cupy_in_cupy_out_on_its_own_stream(gaussian_denoiser):
    """The array is still being made on CuPy's stream when it is handed over, and read on that stream when it comes back."""
    cupy = pytest.importorskip("cupy")
    sampler = Sampler(gaussian_denoiser, solver="ipndm", nfe=4, shape=SHAPE, device="cuda")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        given, busy = cupy.zeros((3, *SHAPE), cupy.float32), cupy.ones((4096, 4096), cupy.float32)
        for _ in range(20):
            busy = busy @ busy * 1e-4
        given += cupy.asarray(latents().numpy()) + 0 * busy[0, 0]
        images = sampler.run(given, output_type="dlpack").images
        assert isinstance(images, cupy.ndarray)
        doubled = cupy.asnumpy(2 * images)
        stream.synchronize()
    np.testing.assert_allclose(doubled, 2 * sampler.run(latents().cuda()).images.cpu().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_arrays_share_memory_and_stream(gaussian_denoiser):
    sampler = Sampler(gaussian_denoiser, solver="ipndm", nfe=4, shape=SHAPE, device="cuda")
    expected, stream = sampler.run(latents().cuda()).images, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        given = StandardArray(latents().cuda())
        images = sampler.run(given, output_type="dlpack").images
    stream.synchronize()
    assert given.streams == [stream.cuda_stream]
    torch.testing.assert_close(images.tensor, expected)
