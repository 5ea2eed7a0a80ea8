"""The C API gives the engine's own bits on the CPU, refuses nonsense, and links from C, pkg-config and CMake."""

import ctypes
import json
import os
import random
import re
import shutil
import subprocess
import threading
from ctypes import byref, c_void_p
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import amed_engine
from amed_engine import make_schedule, make_solver, sample
from amed_engine.engine.export.stepper import Stepper
from amed_engine.engine.export.strict_json import hashed
from amed_engine.engine.export.write_plan import make_tableau, write_plan
from amed_engine.solvers.program import Program

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "csrc" / "examples" / "closed_form.c"
STRICT = ["-Wall", "-Wextra", "-Werror"]


def run(command, **options) -> str:
    options = {"stderr": subprocess.PIPE, **options}
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, **options)
    assert result.returncode == 0, result.stdout[-3000:] + (result.stderr or "")[-3000:]
    return result.stdout


def needs(*tools: str):
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")


# ---- numbers


def test_every_program_has_the_engine_s_bits(case, tools, library):
    def denoise(points, sigma):
        return tools.on_numpy(points, sigma), None

    np.testing.assert_array_equal(library.sample(case.plan.dumps(), case.x, denoise), case.truth)


def test_the_whole_history_may_be_read(tools, library, same_kernels):
    """Fifteen evaluations of non-stationary coefficients on a kept anchor: sixteen columns in the last update."""
    sigmas, solver, x = make_schedule("polynomial", 16, 0.002, 80.0), tools.NonStationary(), tools.latents()
    plan = make_tableau(Program.build(solver, sigmas))
    assert [len(e.columns) for e in plan.evaluations] == list(range(2, 17))
    truth = sample(tools.denoise, x, sigmas, solver).numpy()
    got = library.sample(plan.dumps(), x.numpy(), lambda y, s: (tools.on_numpy(y, s), None))
    np.testing.assert_array_equal(got, truth)
    stepper = Stepper(plan, x.numpy(), combine=same_kernels)
    while not stepper.done:
        stepper.advance(tools.on_numpy(stepper.points, stepper.sigma))
    np.testing.assert_array_equal(stepper.result, truth)


def test_thresholding_agrees_to_one_rounding(tools, library):
    for solver in ("dpmpp", "unipc"):
        program, x = Program.build(make_solver(solver, thresholding=True), tools.SIGMAS, afs=True), tools.latents()
        truth = sample(tools.denoise, x, tools.SIGMAS, program.solver, afs=True).numpy()
        plan = make_tableau(program).dumps()
        got = library.sample(plan, x.numpy(), lambda y, s: (tools.on_numpy(y, s), None))
        np.testing.assert_allclose(got, truth, atol=3e-7 * np.abs(truth).max())


@pytest.mark.parametrize(("solver", "options"), [("amed", {}), ("dpm", {}), ("ipndm", {"max_order": 3})])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_the_predictor_runs_in_c(tools, library, solver, options, afs, features):
    predictor, x = tools.predictor(), tools.latents()
    program = Program.build(make_solver(solver, **options), tools.SIGMAS, predictor, afs=afs)
    denoiser = tools.denoise_with_features if features else tools.denoise
    with torch.no_grad():
        truth = sample(denoiser, x, tools.SIGMAS, program.solver, predictor, afs=afs).numpy()

    def denoise(points, sigma):
        tensors = torch.from_numpy(points.copy()), torch.from_numpy(sigma.copy())
        denoised, bottleneck = tools.denoise_with_features(*tensors)
        return denoised.numpy(), bottleneck.numpy() if features else None

    got = library.sample(make_tableau(program).dumps(), x.numpy(), denoise)
    # The same weights in another order of summation, over six evaluations of a state that begins at 80.
    np.testing.assert_allclose(got, truth, atol=2e-5 * np.abs(truth).max())


def test_the_hash_of_a_table_is_python_s(tools, library):
    """Of texts that end anywhere in a block of SHA-256, and of the same table set with other space."""
    table = make_tableau(tools.program("ipndm"))
    for length in range(70):
        said = 'σ"\\ ,"sha256": "'[: length % 14] + "x" * length
        text = json.dumps(hashed(replace(table, description=said).to_json()))
        for layout in ({}, {"indent": 3}, {"separators": (",", ":")}):
            library.raw.amed_plan_free(library.parse(json.dumps(json.loads(text), **layout)))


def is_taken(library, text: str) -> bool:
    plan, data = c_void_p(), text.encode()
    status = library.raw.amed_plan_parse(data, ctypes.c_size_t(len(data)), byref(plan), None)
    library.raw.amed_plan_free(plan)
    return status == 0


def test_a_damaged_table_is_refused(tools, library, tmp_path):
    write_plan(tools.program("ipndm"), tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    rng, table = random.Random(0), json.loads(text)
    for k in range(2000):
        at, sign = rng.randrange(len(text)), "0123456789.-e,"[k % 14]
        damaged = text[:at] + sign + text[at + k % 2 :]
        if is_taken(library, damaged):
            assert json.loads(damaged) == table, damaged
    other = {**table, "sigmas": [2 * table["sigmas"][0], *table["sigmas"][1:]]}
    first = {"sha256": table.pop("sha256"), **table}
    for said in (other, first, other | {"sha256": None}):
        with pytest.raises(Exception, match=r"entry sha256: expected [0-9a-f]{64} as the last"):
            library.parse(json.dumps(said))
    del other["sha256"]
    library.raw.amed_plan_free(library.parse(json.dumps(other)))


def test_threads_share_a_plan(tools, library):
    """Eight samplers of one plan at once, each with its own noise, against one after the other."""
    plan = library.parse(make_tableau(tools.program("ipndm", afs=True)).dumps())
    noises = [tools.latents(seed).numpy() for seed in range(8)]

    def draw(x):
        sampler = library.create(plan, len(x), x[0].size)
        library.call("sampler_start", sampler, x.ctypes.data_as(c_void_p))
        while not (at := library.next(sampler)).done:
            library._step(sampler, at, x, lambda y, s: (tools.on_numpy(y, s), None))
        result = np.ctypeslib.as_array(at.points, x.shape).copy()
        library.raw.amed_sampler_free(sampler)
        return result

    alone, together = [draw(x) for x in noises], [None] * len(noises)
    threads = [threading.Thread(target=lambda k=k, x=x: together.__setitem__(k, draw(x))) for k, x in enumerate(noises)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library.raw.amed_plan_free(plan)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_starting_again_forgets_what_was(tools, library):
    plan, x = library.parse(make_tableau(tools.program("deis")).dumps()), tools.latents().numpy()
    sampler = library.create(plan, len(x), x[0].size)
    results = []
    for scrap in (3, 0, 0):
        library.call("sampler_start", sampler, x.ctypes.data_as(c_void_p))
        for _ in range(scrap):
            library._step(sampler, library.next(sampler), x, lambda y, s: (y * 0 + 7, None))
        while not (at := library.next(sampler)).done:
            library._step(sampler, at, x, lambda y, s: (tools.on_numpy(y, s), None))
        results.append(np.ctypeslib.as_array(at.points, x.shape).copy())
    np.testing.assert_array_equal(results[1], results[2])
    library.raw.amed_sampler_free(sampler)
    library.raw.amed_plan_free(plan)


def test_facts_of_a_plan(tools, library):
    plan = library.parse(make_tableau(Program.build(make_solver("amed"), tools.SIGMAS, tools.predictor())).dumps())
    facts = [getattr(library.raw, f"amed_plan_{name}")(plan) for name in ("nfe", "size", "bottleneck")]
    assert facts == [6, 0, 15]
    assert library.raw.amed_plan_sigma_max(plan) == float(tools.SIGMAS[0])
    assert library.raw.amed_plan_sigma_min(plan) == float(tools.SIGMAS[-1])
    assert library.raw.amed_api_version() == 1
    library.raw.amed_plan_free(plan)
    assert library.raw.amed_plan_nfe(None) == 0


@pytest.mark.parametrize(("name", "points"), [("ipndm", 1), ("epd", 3)])
@pytest.mark.parametrize("guidance", [None, 1.0, 0.0, 7.5])
def test_a_plan_says_what_the_network_must_be_able_to_do(tools, library, name, points, guidance):
    """Rows of one call, and guidance; none is a guidance of 1."""
    plan = make_tableau(tools.program(name, refined=name == "epd"))
    handle = library.parse(replace(plan, guidance_scale=guidance).dumps())
    assert library.raw.amed_plan_max_points(handle) == points
    assert library.raw.amed_plan_guidance_scale(handle) == (1 if guidance is None else guidance)
    library.raw.amed_plan_free(handle)


# ---- mistakes


def test_mistakes_have_a_status_and_a_sentence(tools, library, tmp_path):
    from ctypes import c_char_p

    text = make_tableau(tools.program("euler")).dumps()
    plan = library.parse(text)
    sampler, x = library.create(plan, 2, 3), np.zeros(6, np.float32)
    missing = c_char_p(os.fsencode(tmp_path / "missing.json"))
    cases = [
        (1, "NULL", lambda: library.call("plan_load", None, byref(c_void_p()))),
        (1, "NULL", lambda: library.call("plan_load", missing, None)),
        (3, "missing.json", lambda: library.call("plan_load", missing, byref(c_void_p()))),
        (3, "cannot be read|directory", lambda: library.call("plan_load", os.fsencode(tmp_path), byref(c_void_p()))),
        (1, "NULL", lambda: library.create(None, 1, 1)),
        (1, "positive", lambda: library.create(plan, 0, 1)),
        (1, "threads", lambda: library.create(plan, 1, 1, threads=0)),
        (1, "too large", lambda: library.create(plan, 1 << 40, 1 << 40)),
        (5, "memory", lambda: library.create(plan, 1, 1 << 43)),
        (4, "start", lambda: library.next(sampler)),
        (4, "start", lambda: library.call("sampler_put", sampler, x.ctypes.data, None, 0)),
        (1, "NULL", lambda: library.call("sampler_start", sampler, None)),
        (1, "NULL", lambda: library.call("sampler_start", None, x.ctypes.data_as(c_void_p))),
    ]
    for status, pattern, call in cases:
        with pytest.raises(Exception, match=pattern) as caught:
            call()
        assert caught.value.status == status
    library.call("sampler_start", sampler, x.ctypes.data_as(c_void_p))
    with pytest.raises(Exception, match="channels"):
        library.call("sampler_put", sampler, x.ctypes.data, x.ctypes.data, 0)
    for _ in range(3):
        library.call("sampler_put", sampler, x.ctypes.data, None, 0)
    with pytest.raises(Exception, match="at its end") as caught:
        library.call("sampler_put", sampler, x.ctypes.data, None, 0)
    assert caught.value.status == 4
    library.raw.amed_sampler_free(sampler)
    library.raw.amed_plan_free(plan)
    library.raw.amed_sampler_free(None)


def test_cuda_is_refused_where_it_was_not_built(tools, library):
    if library.raw.amed_has_cuda():
        pytest.skip("this build has CUDA")
    plan = library.parse(make_tableau(tools.program("euler")).dumps())
    with pytest.raises(Exception, match="without CUDA") as caught:
        library.call("sampler_create_cuda", plan, 1, 1, None, byref(c_void_p()))
    assert caught.value.status == 6
    library.raw.amed_plan_free(plan)


@needs("nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_cuda_device_compiles_without_spills(tmp_path, architecture):
    options = ["-std=c++17", "-O3", "-cubin", f"-arch={architecture}", "-Xptxas=-v", "-Werror=all-warnings"]
    source = ROOT / "csrc" / "library" / "cuda_device.cu"
    includes = ["-DAMED_WITH_CUDA", f"-I{ROOT / 'csrc' / 'include'}"]
    log = run(["nvcc", *options, *includes, source, "-o", tmp_path / "device.cubin"], stderr=subprocess.STDOUT)
    kernels = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL)
    assert len(kernels) == 3
    spills = re.findall(r"(\d+) bytes spill", log)
    assert spills
    assert not any(map(int, spills))
    # 128 threads a block: 64 registers leave eight blocks on a processor.
    assert all(int(registers) <= 64 for _, registers in kernels), kernels


class DeviceArray:
    """Device memory of the library as torch takes it, without a copy."""

    def __init__(self, address: int, shape: tuple[int, ...]):
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": "<f4", "version": 3}


@pytest.mark.gpu
@pytest.mark.parametrize("learned", [False, True])
def test_a_cuda_stream_agrees_with_the_engine(tools, library, learned):
    if not library.raw.amed_has_cuda():
        pytest.skip("this build has no CUDA")
    predictor = tools.predictor().cuda() if learned else None
    program = Program.build(make_solver("ipndm"), tools.SIGMAS, predictor, afs=True)
    x, stream, sampler = tools.latents().cuda(), torch.cuda.Stream(), c_void_p()
    with torch.no_grad():
        keywords = {"afs": True}
        truth = sample(tools.denoise_with_features, x, tools.SIGMAS, program.solver, predictor, **keywords)
    plan = library.parse(make_tableau(program).dumps())
    library.call("sampler_create_cuda", plan, len(x), x[0].numel(), stream.cuda_stream, byref(sampler))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        library.call("sampler_start", sampler, c_void_p(x.data_ptr()))
        while not (at := library.next(sampler)).done:
            points, sigma = (
                torch.as_tensor(DeviceArray(ctypes.cast(pointer, c_void_p).value, shape), device="cuda")
                for pointer, shape in ((at.points, tuple(x.shape)), (at.sigma, (len(x),)))
            )
            denoised, features = (tensor.contiguous() for tensor in tools.denoise_with_features(points, sigma))
            library.call(
                "sampler_put", sampler, denoised.data_ptr(), features.data_ptr() if learned else None, 4 * learned
            )
        address = ctypes.cast(at.points, c_void_p).value
        got = torch.as_tensor(DeviceArray(address, tuple(x.shape)), device="cuda").clone()
    stream.synchronize()
    library.raw.amed_sampler_free(sampler)
    library.raw.amed_plan_free(plan)
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


# ---- programs


@pytest.fixture
def problem(tools, tmp_path):
    """plan.json, noise.f32 and the engine's samples."""
    program = tools.program("ipndm", refined=True, afs=True)
    assert program.nfe == 5
    write_plan(program, tmp_path / "plan.json")
    noise = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(1))
    noise.numpy().tofile(tmp_path / "noise.f32")
    x = noise * float(np.float32(program.sigmas[0]))
    return tmp_path, sample(tools.denoise, x, tools.SIGMAS, program.solver, program.predictor, afs=True).numpy()


def check_program(program: Path, problem) -> None:
    folder, truth = problem
    arguments = [folder / "plan.json", folder / "noise.f32", folder / "sample.f32", 3]
    assert run([program, *arguments]) == "5 calls of the network, 3 samples\n"
    np.testing.assert_array_equal(np.fromfile(folder / "sample.f32", np.float32).reshape(truth.shape), truth)


@needs("g++")
@pytest.mark.parametrize("language", ["c", "c++"])
def test_a_host_program_has_the_engine_s_bits(problem, library, language, tmp_path):
    """The header alone and the library: as C11 with gcc, and as C++."""
    if language == "c++":
        source = tmp_path / "header.cpp"
        source.write_text('#include "amed/amed.h"\nint main() { return amed_api_version() - AMED_API_VERSION; }\n')
        options = ["-std=c++17"]
    else:
        source, options = EXAMPLE, ["-std=c11", "-O2"]
    program, path = tmp_path / "program", amed_engine.get_library()
    compiler = ["g++"] if language == "c++" else [shutil.which("gcc") or "cc"]
    flags = [*options, *STRICT, "-pedantic", f"-I{amed_engine.get_include()}"]
    run([*compiler, *flags, source, path, f"-Wl,-rpath,{Path(path).parent}", "-o", program])
    if language == "c++":
        run([program])
    else:
        check_program(program, problem)


@needs("pkg-config", "gcc")
def test_pkg_config_finds_it(problem, library, tmp_path):
    environment = {**os.environ, "PKG_CONFIG_PATH": amed_engine.get_pkgconfig_dir()}
    flags = run(["pkg-config", "--cflags", "--libs", "amed"], env=environment).split()
    run(["gcc", "-std=c11", "-O2", EXAMPLE, *flags, "-o", tmp_path / "program"])
    check_program(tmp_path / "program", problem)


@needs("cmake", "gcc")
def test_cmake_finds_it(problem, library, tmp_path):
    build = tmp_path / "build"
    run(["cmake", "-S", EXAMPLE.parent, "-B", build, f"-Damed_DIR={amed_engine.get_cmake_dir()}"])
    run(["cmake", "--build", build])
    check_program(build / "closed_form", problem)


def test_versions_agree():
    for name in ("pkgconfig/amed.pc", "cmake/amed/amed-config-version.cmake"):
        assert amed_engine.__version__ in (ROOT / "csrc" / "lib" / name).read_text()


@needs("nm")
def test_only_the_c_api_is_visible(library):
    lines = run(["nm", "-D", "--defined-only", amed_engine.get_library()]).splitlines()
    ours = {line.split()[-1] for line in lines if "amed" in line}
    header = (ROOT / "csrc" / "include" / "amed" / "amed.h").read_text()
    assert ours
    assert {name for name in ours if not name.startswith("amed_") or name not in header} == set()
