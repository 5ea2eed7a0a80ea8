"""`Sampler.run` speaks DLPack: arrays of other libraries go in and come out in their own memory, without a copy."""

import types

import numpy as np
import pytest
import torch

from amed_engine import ConfigError, Sampler
from amed_engine.arrays import delivered, imported

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


@pytest.mark.parametrize(
    ("batch", "message"),
    [
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
