"""Routes through what the engine writes: packages of the whole loop, and plans for a host that owns the network."""

from __future__ import annotations

import ctypes
import functools
from contextlib import ExitStack
from ctypes import byref, c_float, c_int32, c_int64, c_void_p
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from harness import Unavailable
from routes import TRACED, Bench, Draw, Route, temporary_folder
from torch import Tensor

import amed_engine


def package(format: str, suffix: str, bench: Bench, stack: ExitStack) -> Draw:
    """The whole loop, written and read back; the comparison here stands for the check of `export`."""
    if format == "onnx" and not (find_spec("onnxruntime") and find_spec("onnxscript")):
        raise Unavailable("onnxruntime or onnxscript is not installed")
    file = temporary_folder(stack) / f"loop{suffix}"
    bench.sampler().export(file, format, max_batch=64, verify=False)
    loaded = amed_engine.load_package(file)
    return lambda: loaded.run(bench.latents, class_labels=bench.classes).images


def dlpack(bench: Bench, stack: ExitStack) -> Draw:
    sampler, latents = bench.sampler(), bench.latents.numpy()
    return lambda: torch.from_numpy(
        sampler.run(latents, class_labels=bench.classes, output_type="dlpack").images  # type: ignore[arg-type]
    )


@torch.no_grad()
def on_numpy(bench: Bench, points: np.ndarray, sigma: np.ndarray) -> Tensor:
    """The host's network on the host's memory."""
    return bench.denoised(torch.from_numpy(points), torch.from_numpy(sigma))


def stepper(bench: Bench, stack: ExitStack) -> Draw:
    file = temporary_folder(stack) / "plan.json"
    amed_engine.write_plan(bench.plain(), file)
    plan = amed_engine.read_plan(file)
    x = bench.latents.numpy() * np.float32(plan.sigmas[0])
    stepper = amed_engine.Stepper(plan, x)

    def draw() -> Tensor:
        stepper.restart(x)
        while not stepper.done:
            stepper.advance(on_numpy(bench, stepper.points, stepper.sigma).numpy())
        return torch.from_numpy(stepper.result)

    return draw


class Evaluation(ctypes.Structure):
    """amed_evaluation of amed.h."""

    _fields_ = (
        ("points", ctypes.POINTER(c_float)),
        ("sigma", ctypes.POINTER(c_float)),
        ("rows", c_int64),
        ("index", c_int32),
        ("done", c_int32),
    )


class Host:
    """A program that links against libamed and owns its network."""

    def __init__(self, file: str, bench: Bench, stack: ExitStack):
        self.bench, self.shape, self.message = bench, bench.shape, ctypes.create_string_buffer(512)
        self.library = ctypes.CDLL(amed_engine.get_library())
        plan, self.sampler = c_void_p(), c_void_p()
        self.call("plan_load", file.encode(), byref(plan))
        batch, size = c_int64(bench.batch), c_int64(bench.latents[0].numel())
        self.call("sampler_create", plan, batch, size, torch.get_num_threads(), byref(self.sampler))
        self.library.amed_plan_free(plan)  # the sampler keeps what it needs
        stack.callback(self.library.amed_sampler_free, self.sampler)

    def call(self, name: str, *arguments: Any) -> None:
        if getattr(self.library, f"amed_{name}")(*arguments, self.message):
            raise RuntimeError(self.message.value.decode())

    def draw(self, x: Tensor) -> Tensor:
        self.call("sampler_start", self.sampler, c_void_p(x.data_ptr()))
        at = Evaluation()
        while True:
            self.call("sampler_next", self.sampler, byref(at))
            points = np.ctypeslib.as_array(at.points, (at.rows, *self.shape))
            if at.done:
                return torch.from_numpy(points)
            denoised = on_numpy(self.bench, points, np.ctypeslib.as_array(at.sigma, (at.rows,))).contiguous()
            self.call("sampler_put", self.sampler, c_void_p(denoised.data_ptr()), None, c_int64(0))


def c_api(bench: Bench, stack: ExitStack) -> Draw:
    try:
        amed_engine.get_library()
    except amed_engine.ConfigError as error:
        raise Unavailable(str(error)) from error
    file = temporary_folder(stack) / "plan.json"
    plan = amed_engine.write_plan(bench.plain(), file)
    host, x = Host(str(file), bench, stack), bench.latents * float(np.float32(plan.sigmas[0]))
    return lambda: host.draw(x)


PACKAGES = ("amed_engine/engine/export/write.py", "amed_engine/engine/export/package.py")
FILES = (
    Route(
        "AOTInductor `.pt2`, for C++ without Python too",
        "export.md",
        "torch; a C++ compiler where it is written",
        PACKAGES,
        "per_sample",
        functools.partial(package, "pt2", ".pt2"),
        TRACED,
    ),
    Route(
        "ExportedProgram",
        "export.md",
        "torch",
        PACKAGES,
        "per_sample",
        functools.partial(package, "exported", ".pt2"),
        TRACED,
    ),
    Route(
        "ONNX",
        "export.md",
        "onnxruntime",
        PACKAGES,
        "per_sample",
        functools.partial(package, "onnx", ".onnx"),
        TRACED,
    ),
    Route(
        "Arrays by DLPack",
        "arrays.md",
        "any library that has it",
        ("amed_engine/engine/arrays.py",),
        "per_sample",
        dlpack,
        0.0,
    ),
    Route(
        "C API `amed.h`",
        "c-api.md",
        "a C compiler",
        ("csrc/include/amed/amed.h", "csrc/library/*.cpp", "csrc/library/*.h"),
        "multistep",
        c_api,
        0.0,
    ),
    Route(
        "Stepper on NumPy or CuPy",
        "cupy.md",
        "numpy or cupy",
        ("amed_engine/engine/export/stepper.py", "amed_engine/integrations/cupy.py"),
        "multistep",
        stepper,
    ),
)
