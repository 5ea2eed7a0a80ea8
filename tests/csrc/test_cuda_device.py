"""The CUDA part of the C library, executed: its sources compiled for the CPU by csrc/tests/emulated, device memory NaN."""

import shutil
import subprocess
import sys
from ctypes import byref, c_void_p
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from amed_engine import make_solver, sample
from amed_engine.engine.export.stepper import Stepper
from amed_engine.engine.export.tableau import MeanRows
from amed_engine.engine.export.write_plan import make_tableau
from amed_engine.solvers.program import Program

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.fixture(scope="session")
def on_stream(tmp_path_factory, open_library):
    """The C library with CUDA, whose samplers are all made on a stream."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("emulated") / "libamed.so"
    sources = [*CSRC.glob("*/*.cu"), *CSRC.glob("library/*.cpp"), *CSRC.glob("cpu/*.cpp"), f"-I{CSRC / 'include'}"]
    options = ["-O0", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    options += ["-DAMED_WITH_CUDA", "-fvisibility=hidden", "-shared", "-fPIC", "-o", path]
    command = [sys.executable, CSRC / "tests/emulated/nvcc.py", *options, *sources]
    subprocess.run([str(word) for word in command], check=True)

    class OnStream(open_library):
        def create(self, plan, batch, size, threads=1):
            sampler = c_void_p()
            self.call("sampler_create_cuda", plan, batch, size, None, byref(sampler))
            return sampler

    return OnStream(str(path))


def check(got: np.ndarray, truth: np.ndarray) -> None:
    np.testing.assert_allclose(got, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).max())


def test_every_program_draws_the_engine_s_samples(case, tools, on_stream):
    assert on_stream.raw.amed_has_cuda() == 1
    check(on_stream.sample(case.plan.dumps(), case.x, lambda y, s: (tools.on_numpy(y, s), None)), case.truth)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("name", ["dpm", "amed", "euler", "ipndm"])
def test_a_predictor_reads_the_bottleneck(tools, on_stream, name, afs):
    program = Program.build(make_solver(name), tools.SIGMAS, tools.predictor(), afs=afs)
    x = tools.latents()
    truth = sample(tools.denoise_with_features, x, tools.SIGMAS, program.solver, program.predictor, afs=afs)

    def denoise(points, sigma):
        answers = tools.denoise_with_features(torch.from_numpy(points), torch.from_numpy(sigma))
        return tuple(np.ascontiguousarray(answer.numpy()) for answer in answers)

    check(on_stream.sample(make_tableau(program).dumps(), x.numpy(), denoise), truth.detach().numpy())


@pytest.mark.parametrize(("rows", "chosen"), [(1, [0] * 5), (5, [0, 4, 1, 4, 2]), (2, [0, 1, 1, 1, 1])])
def test_a_sample_begins_with_the_mean_of_its_class(tools, on_stream, same_kernels, rows, chosen):
    shape, generator = tools.latents().shape[1:], np.random.default_rng(4)
    x = generator.normal(size=(5, *shape)).astype(np.float32) * np.float32(80)
    means = generator.normal(size=(rows, x[0].size)) * 3
    table = make_tableau(tools.program("unipc", afs=True))
    table = replace(table, shape=tuple(shape), mean=MeanRows.of(0 if rows == 1 else 4, means.tolist()))
    classes = None if rows == 1 else np.array([-1, 3, 0, 3, 1], np.int32)
    stepper = Stepper(table, x, classes, combine=same_kernels)
    while not stepper.done:
        stepper.advance(tools.on_numpy(stepper.points, stepper.sigma))
    got = on_stream.sample(table.dumps(), x, lambda y, s: (tools.on_numpy(y, s), None), classes)
    check(got, stepper.result)
    alone = replace(table, mean=MeanRows.of(0, [means[chosen[1]].tolist()])).dumps()
    one = on_stream.sample(alone, x[1:2], lambda y, s: (tools.on_numpy(y, s), None))
    np.testing.assert_array_equal(got[1:2], one)


def test_a_class_that_is_none_shows_in_its_sample(tools, on_stream):
    """A stream cannot be asked without waiting for it."""
    x = tools.latents().numpy()
    mean = MeanRows.of(2, np.ones((3, x[0].size)).tolist())
    table = replace(make_tableau(tools.program("euler", afs=True)), shape=x.shape[1:], mean=mean)
    classes = np.array([1, 2, -2], np.int32)
    got = on_stream.sample(table.dumps(), x, lambda y, s: (tools.on_numpy(y, s), None), classes)
    assert np.isnan(got).reshape(3, -1).all(1).tolist() == [False, True, True]
    assert np.isfinite(got[0]).all()


def test_what_a_stream_cannot_do_is_refused(tools, on_stream):
    thresholded = on_stream.parse(
        make_tableau(Program.build(make_solver("dpmpp", thresholding=True), tools.SIGMAS)).dumps()
    )
    with pytest.raises(Exception, match="thresholding is not on this device") as caught:
        on_stream.create(thresholded, 1, 1)
    assert caught.value.status == 6
    plan = on_stream.parse(make_tableau(tools.program("euler")).dumps())
    with pytest.raises(Exception, match=r"out of device memory: \d+ bytes") as caught:
        on_stream.create(plan, 1 << 30, 1 << 13)
    assert caught.value.status == 5
    for each in (thresholded, plan):
        on_stream.raw.amed_plan_free(each)
