"""Every kind of program with the engine's own result, and the C library through ctypes, as a foreign host calls it."""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_char, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import amed_engine
from amed_engine import AMEDPredictor, Midpoint, kernels, make_schedule, make_solver, sample
from amed_engine.engine.export.tableau import MAX_COLUMNS, Tableau
from amed_engine.engine.export.write_plan import make_tableau
from amed_engine.errors import ConfigError
from amed_engine.solvers.base import Solver
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.program import Program
from amed_engine.solvers.stage import Row, Stage

# ---- programs and denoisers with known answers ----

SHAPE = (3, 2, 5, 7)
SIGMAS = make_schedule("polynomial", 4, 0.002, 80.0)
# name, options, points of a midpoint; every solver, plain and refined, with and without a free first evaluation.
SOLVERS = {
    "euler": ("euler", {}),
    "heun": ("heun", {}),
    "dpm": ("dpm", {}),
    "ipndm": ("ipndm", {}),
    "deis": ("deis", {}),
    "dpmpp": ("dpmpp", {"thresholding": False}),
    "dpmpp-noise": ("dpmpp", {"predict_x0": False}),
    "unipc": ("unipc", {"thresholding": False}),
    "unipc-noise": ("unipc", {"predict_x0": False}),
    "amed": ("amed", {}),
    "epd": ("amed", {"points": 3}),
}
CASES = [
    (name, refined, afs, last)
    for name, (solver, options) in SOLVERS.items()
    for refined in (False, True)
    for afs in (False, True, "mean")
    for last in (False, True)
    if make_solver(solver, **options).takes_predictor != ("none" if refined else "required")
]


@dataclass(frozen=True)
class NonStationary(Solver):
    """x_{n+1} = a_n x_0 + Σ_j b_nj D_j over the whole history, the anchor kept at x_0: as many columns as a plan may have."""

    @property
    def memory(self) -> int:
        return MAX_COLUMNS - 2

    @property
    def data_prediction(self) -> bool:
        return True

    def evaluations(self, with_midpoint: bool) -> int:
        return 1

    def step(self, past, sigma, sigma_next, midpoint, i, n) -> list[Stage]:
        b = tuple((1 - sigma_next / SIGMAS[0]) * 2.0**-j / (2 - 2.0**-i) for j in range(i + 1))
        return [Stage((Row(sigma_next / SIGMAS[0], b),))]


def midpoints(points: int) -> list[Midpoint]:
    if points == 1:
        return [Midpoint(0.3 + 0.1 * i, 1.01, 0.98) for i in range(len(SIGMAS) - 1)]
    k = torch.arange(points) / 10
    return [Midpoint(0.3 + 0.1 * i + k, (1 + k) / points, 1 - k / 10) for i in range(len(SIGMAS) - 1)]


def program(name: str, refined: bool = False, afs: FirstStep = False, last: bool = False) -> Program:
    solver, options = SOLVERS[name]
    chosen = midpoints(options.get("points", 1)) if refined else None
    mean = means(1) if afs == "mean" else None
    return Program.build(make_solver(solver, **options), SIGMAS, chosen, afs=afs, mean=mean, denoise_to_zero=last)


def means(rows: int) -> torch.Tensor:
    return torch.randn(rows, *SHAPE[1:], generator=torch.Generator().manual_seed(9)) * 3


def keywords(built: Program) -> dict:
    """Of `sample`, for a program without classes."""
    return {"afs": built.afs, "mean": built.mean, "denoise_to_zero": built.denoise_to_zero}


def predictor(**options) -> AMEDPredictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return AMEDPredictor(0.1, 0.2, bottleneck=(3, 5), **options).eval()


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * SIGMAS[0].float()


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser of unit Gaussian data."""
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def denoise_with_features(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with a bottleneck (B, 4, 3, 5) that depends on both arguments."""
    pooled = x.flatten(1)[:, :60].reshape(-1, 4, 3, 5) / (1 + sigma.view(-1, 1, 1, 1))
    return denoise(x, sigma), pooled + sigma.view(-1, 1, 1, 1).log()


def on_numpy(points, sigma):
    return denoise(torch.from_numpy(points), torch.from_numpy(sigma)).numpy()


class Case(NamedTuple):
    program: Program
    plan: Tableau
    x: np.ndarray
    truth: np.ndarray  # `sample` of the engine


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request) -> Case:
    built, x = program(*request.param), latents()
    truth = sample(denoise, x, SIGMAS, built.solver, built.predictor, **keywords(built))
    return Case(built, make_tableau(built), x.numpy(), truth.numpy())


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """What single tests build cases of their own from."""
    names = (
        "SIGMAS",
        "program",
        "predictor",
        "latents",
        "means",
        "keywords",
        "NonStationary",
        "denoise",
        "denoise_with_features",
        "on_numpy",
    )
    return SimpleNamespace(**{name: globals()[name] for name in names})


# ---- the C library ----

Denoise = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray | None]]


class Message(ctypes.Structure):
    _fields_ = (("text", c_char * 512),)


class At(ctypes.Structure):
    _fields_ = (
        ("points", POINTER(c_float)),
        ("sigma", POINTER(c_float)),
        ("rows", c_int64),
        ("index", c_int32),
        ("done", c_int32),
    )


class CError(Exception):
    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class CLibrary:
    """The functions of amed.h, raising CError with the message of a call that fails."""

    def __init__(self, path: str):
        self.raw = ctypes.CDLL(path)
        for name in ("sigma_max", "sigma_min", "guidance_scale"):
            getattr(self.raw, f"amed_plan_{name}").restype = c_double
        self.raw.amed_plan_size.restype = self.raw.amed_plan_bottleneck.restype = c_int64
        sizes = (c_void_p, c_int64, c_int64)
        self.raw.amed_sampler_create.argtypes = (*sizes, c_int, c_void_p, c_void_p)
        self.raw.amed_sampler_create_cuda.argtypes = (*sizes, c_void_p, c_void_p, c_void_p)
        self.raw.amed_plan_parse.argtypes = (c_char_p, c_size_t, c_void_p, c_void_p)
        self.raw.amed_sampler_put.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_void_p)
        for name in ("amed_plan_free", "amed_sampler_free"):
            getattr(self.raw, name).argtypes, getattr(self.raw, name).restype = (c_void_p,), None
        for name in ("nfe", "sigma_max", "sigma_min", "size", "bottleneck", "max_points", "guidance_scale", "classes"):
            getattr(self.raw, f"amed_plan_{name}").argtypes = (c_void_p,)

    def call(self, name: str, *arguments) -> None:
        message = Message()
        status = getattr(self.raw, f"amed_{name}")(*arguments, byref(message))
        if status:
            raise CError(status, message.text.decode())
        assert message.text == b""

    def parse(self, text: str) -> c_void_p:
        plan, data = c_void_p(), text.encode()
        self.call("plan_parse", data, len(data), byref(plan))
        return plan

    def create(self, plan: c_void_p, batch: int, size: int, threads: int = 1) -> c_void_p:
        sampler = c_void_p()
        self.call("sampler_create", plan, batch, size, threads, byref(sampler))
        return sampler

    def start(self, sampler: c_void_p, x: np.ndarray, classes: np.ndarray | None = None) -> None:
        if classes is None:
            return self.call("sampler_start", sampler, x.ctypes.data_as(c_void_p))
        assert (classes.dtype, classes.shape) == (np.int32, x.shape[:1])
        self.call("sampler_start_classes", sampler, x.ctypes.data_as(c_void_p), classes.ctypes.data_as(c_void_p))

    def next(self, sampler: c_void_p) -> At:
        at = At()
        self.call("sampler_next", sampler, byref(at))
        return at

    def sample(self, text: str, x: np.ndarray, denoise: Denoise, classes: np.ndarray | None = None) -> np.ndarray:
        """Everything that a host does, for x (B, ...) already scaled."""
        plan = self.parse(text)
        sampler = self.create(plan, len(x), x[0].size)
        self.raw.amed_plan_free(plan)  # the sampler keeps what it needs
        self.start(sampler, x, classes)
        while not (at := self.next(sampler)).done:
            self._step(sampler, at, x, denoise)
        result = np.ctypeslib.as_array(at.points, x.shape).copy()
        self.raw.amed_sampler_free(sampler)
        return result

    def _step(self, sampler: c_void_p, at: At, x: np.ndarray, denoise: Denoise) -> None:
        points = np.ctypeslib.as_array(at.points, (at.rows, *x.shape[1:]))
        denoised, features = denoise(points, np.ctypeslib.as_array(at.sigma, (at.rows,)))
        denoised = np.ascontiguousarray(denoised)
        channels = 0 if features is None else features.shape[1]
        where = None if features is None else np.ascontiguousarray(features)
        address = None if where is None else where.ctypes.data
        self.call("sampler_put", sampler, denoised.ctypes.data, address, channels)


@pytest.fixture(scope="session")
def open_library() -> type[CLibrary]:
    return CLibrary


@pytest.fixture(scope="session")
def library() -> CLibrary:
    try:
        return CLibrary(amed_engine.get_library())
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def same_kernels():
    """`combine` of the engine on NumPy arrays: the compiled kernels that `sample` uses."""

    def combine(sources, coeffs, outputs):
        tensors = [torch.from_numpy(np.ascontiguousarray(source)) for source in sources]
        made = kernels.combine(tensors, torch.from_numpy(np.ascontiguousarray(coeffs)))
        for target, value in zip(outputs, made, strict=True):
            target[...] = value.numpy()

    return combine
