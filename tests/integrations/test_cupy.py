"""The CuPy stepper: on the CPU with NumPy arrays and the same kernels compiled for it, on a GPU with CuPy itself."""

import ctypes
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from amed_engine import make_solver, sample
from amed_engine.engine.export.stepper import Stepper
from amed_engine.engine.export.tableau import MeanRows
from amed_engine.engine.export.write_plan import make_tableau
from amed_engine.errors import ConfigError
from amed_engine.integrations import cupy as integration
from amed_engine.kernels import cuda
from amed_engine.solvers.program import Program


@pytest.fixture
def on_host(monkeypatch, emulated_kernel):
    """The integration with NumPy in the place of CuPy, and the CUDA kernels compiled for the CPU."""
    monkeypatch.setattr(integration, "_kernel", emulated_kernel)
    monkeypatch.setattr(integration, "_cupy", lambda: np)


def check(got: np.ndarray, truth: np.ndarray, x: np.ndarray) -> None:
    """To rounding of the first steps, whose numbers are as large as x: the kernel rounds once where NumPy does twice, and
    Heun's corrector multiplies the difference by the ratio of noise levels."""
    eps = float(np.finfo(x.dtype).eps)
    np.testing.assert_allclose(got, truth, rtol=10 * eps, atol=8 * eps * np.abs(x).max())


def test_the_same_interface_on_numpy(case, tools, on_host):
    stepper = integration.stepper(case.plan, case.x)
    plain = Stepper(case.plan, case.x)
    while not stepper.done:
        np.testing.assert_array_equal(stepper.sigma, plain.sigma)
        stepper.advance(tools.on_numpy(stepper.points, stepper.sigma))
        plain.advance(tools.on_numpy(plain.points, plain.sigma))
    check(stepper.result, plain.result, case.x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_coefficients_of_each_sample_reach_the_kernel(tools, on_host, dtype):
    plan = make_tableau(Program.build(make_solver("dpm"), tools.SIGMAS, tools.predictor()))
    x = tools.latents().numpy().astype(dtype)
    stepper, plain = integration.stepper(plan, x), Stepper(plan, x)
    features = np.random.default_rng(0).normal(size=(len(x), 4, 3, 5)).astype(dtype)
    while not stepper.done:
        for each in (stepper, plain):
            each.advance((each.points / (1 + each.sigma[:, None, None, None] ** 2)).astype(dtype), features)
    check(stepper.result, plain.result, x)


def test_classes_choose_the_mean_of_the_first_step(tools, on_host):
    x, means = tools.latents().numpy(), np.random.default_rng(1).normal(size=(5, 70))
    plan = replace(
        make_tableau(tools.program("ipndm", afs=True)), shape=x.shape[1:], mean=MeanRows.of(4, means.tolist())
    )
    stepper, plain = integration.stepper(plan, x, [3, -1, 0]), Stepper(plan, x, [3, -1, 0])
    assert not np.array_equal(stepper.points, integration.stepper(plan, x, [3, -1, 1]).points)
    while not stepper.done:
        for each in (stepper, plain):
            each.advance(tools.on_numpy(each.points, each.sigma))
    check(stepper.result, plain.result, x)


def test_noise_prediction_copies_nothing(tools):
    """What the host gets is the memory that the kernel wrote, and what it hands over is read where it lies."""
    seen = []

    def combine(sources, coeffs, outputs):
        Stepper._plain_combine(stepper, sources, coeffs, outputs)
        seen.append((list(sources), list(outputs)))

    x = tools.latents().numpy()
    stepper = Stepper(make_tableau(tools.program("ipndm", refined=True)), x, combine=combine)
    assert stepper.points is x
    while not stepper.done:
        denoised = tools.on_numpy(stepper.points, stepper.sigma)
        stepper.advance(denoised)
        sources, outputs = seen[-1]
        assert any(np.shares_memory(source, denoised) for source in sources)
        following = stepper.result if stepper.done else stepper.points
        assert any(np.shares_memory(output, following) for output in outputs)


@pytest.mark.parametrize("name", ["ipndm", "dpmpp", "unipc", "epd"])
def test_an_engine_may_write_into_the_same_memory_again(tools, name):
    plan, x = make_tableau(tools.program(name, refined=name == "epd")), tools.latents().numpy()
    fresh, reused, buffer = Stepper(plan, x), Stepper(plan, x), np.empty((3 * len(x), *x.shape[1:]), np.float32)
    while not fresh.done:
        fresh.advance(tools.on_numpy(fresh.points, fresh.sigma))
        out = buffer[: len(reused.points)]
        out[...] = tools.on_numpy(reused.points, reused.sigma)
        reused.advance(out)
    np.testing.assert_array_equal(reused.result, fresh.result)


def test_restarting_gives_what_a_new_one_does(tools):
    plan = make_tableau(tools.program("unipc", afs=True))
    again = Stepper(plan, tools.latents(1).numpy())
    again.advance(again.points * 0)
    again.restart(tools.latents(2).numpy())
    fresh = Stepper(plan, tools.latents(2).numpy())
    for each in (again, fresh):
        while not each.done:
            each.advance(tools.on_numpy(each.points, each.sigma))
    np.testing.assert_array_equal(again.result, fresh.result)
    with pytest.raises(ConfigError, match="as before"):
        again.restart(tools.latents(2).numpy()[:1])


def test_structures_are_those_of_the_kernels():
    assert integration.COMBINE_ARGS.itemsize == ctypes.sizeof(cuda.CombineArgs)
    assert integration.VIEW.itemsize == ctypes.sizeof(cuda.View)
    for name, _ in cuda.CombineArgs._fields_:
        assert integration.COMBINE_ARGS.fields[name][1] == getattr(cuda.CombineArgs, name).offset, name


def test_the_module_needs_neither_torch_nor_cupy_to_be_imported():
    code = "import sys, amed_engine.integrations.cupy\nsys.exit(' '.join({'torch', 'cupy'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("cupy") is not None, reason="cupy is installed")
def test_a_missing_cupy_is_named_with_its_install_line(tools):
    with pytest.raises(ConfigError, match=r"pip install 'amed-engine\[gpu\]'"):
        integration.stepper(make_tableau(tools.program("euler")), tools.latents().numpy())


# ---- on a GPU


def draw(plan, x, cupy):
    stepper = integration.stepper(plan, x)
    while not stepper.done:
        sigma = stepper.sigma.reshape(-1, *[1] * (x.ndim - 1))
        stepper.advance(stepper.points / (1 + sigma**2))
    return stepper.result


@pytest.mark.gpu
def test_cupy_agrees_with_the_engine(case):
    cupy = pytest.importorskip("cupy")
    got = cupy.asnumpy(draw(case.plan, cupy.asarray(case.x), cupy))
    scale = np.abs(case.truth).max()
    np.testing.assert_allclose(got, case.truth, atol=1e-4 * scale)


@pytest.mark.gpu
def test_cupy_agrees_in_double_precision(tools):
    cupy = pytest.importorskip("cupy")
    for name in ("heun", "deis", "unipc"):
        program, x = tools.program(name), tools.latents().double()
        truth = sample(tools.denoise, x, tools.SIGMAS, program.solver).numpy()
        got = cupy.asnumpy(draw(make_tableau(program), cupy.asarray(x.numpy()), cupy))
        np.testing.assert_allclose(got, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(tools):
    """A stream that is being captured refuses every synchronization and every copy from pageable memory."""
    cupy = pytest.importorskip("cupy")
    plan, x = make_tableau(tools.program("ipndm", afs=True)), cupy.asarray(tools.latents().numpy())
    stepper = integration.stepper(plan, x)

    def loop():
        while not stepper.done:
            stepper.advance(stepper.points / (1 + stepper.sigma.reshape(-1, 1, 1, 1) ** 2))
        return stepper.result

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        expected = loop().copy()  # compiles, and fills CuPy's memory pool
        stream.synchronize()
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
        stepper.restart(x)
        result = loop()
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    cupy.testing.assert_array_equal(result, expected)


@pytest.mark.gpu
def test_nothing_waits_for_classes_on_the_gpu(tools):
    """A graph that restarts draws the classes of the time when it is launched."""
    cupy = pytest.importorskip("cupy")
    x, means = cupy.asarray(tools.latents().numpy()), np.random.default_rng(1).normal(size=(5, 70))
    plan = replace(
        make_tableau(tools.program("ipndm", afs=True)), shape=x.shape[1:], mean=MeanRows.of(4, means.tolist())
    )
    classes, chosen, stream = cupy.asarray([3, -1, 0]), [1, 1, 2], cupy.cuda.Stream(non_blocking=True)
    with stream:
        expected = integration.stepper(plan, x, chosen).points.copy()
        stepper = integration.stepper(plan, x, classes)  # compiles, and fills CuPy's memory pool
        stream.synchronize()
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
        stepper.restart(x, classes)
        graph = stream.end_capture()
        classes[...] = cupy.asarray(chosen)
        graph.launch(stream)
        stream.synchronize()
    cupy.testing.assert_array_equal(stepper.points, expected)


@pytest.mark.gpu
def test_torch_tensors_come_and_go_without_a_copy(tools):
    cupy = pytest.importorskip("cupy")
    x = tools.latents().cuda()
    lent = cupy.from_dlpack(x)
    assert integration.address(lent) == x.data_ptr()
    got = torch.from_dlpack(draw(make_tableau(tools.program("deis")), lent, cupy))
    truth = sample(tools.denoise, x, tools.SIGMAS, make_solver("deis"))
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))
