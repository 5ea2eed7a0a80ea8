"""What several test files share: small models with known answers, a double of CUDA's capture, and what to skip where."""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from amed_engine import cli
from amed_engine.networks import EDMPrecond

# Of tests/support, what tests of several packages share.
pytest_plugins = ("host_guard", "publisher", "tables")

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT.parent / "shared" / "goldens"

# The same examples every time, and no clock: a loaded machine is not a failure.
settings.register_profile("amed", derandomize=True, deadline=None)
settings.load_profile("amed")


@pytest.hookimpl(optionalhook=True)  # pytest-xdist asks
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: one worker per core, four at most; none beside a GPU, whose memory they would share."""
    return 0 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), 4)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):  # not item.keywords, which hold the names of folders too
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The tests' tensors are tiny: more threads only wait for each other, and one keeps sums in one order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _exact_convolutions(request):
    """On a GPU, TensorFloat-32 or not is cuDNN's choice by batch size, and worth 1e-3: no comparison would hold. Nor would one
    to the last bit with kernels that add in any order."""
    cudnn, on_gpu = torch.backends.cudnn, request.node.get_closest_marker("gpu") is not None
    before = cudnn.allow_tf32, cudnn.deterministic
    # The old switch, which sets the new ones: where only those of convolutions are set, torch.export refuses to read it.
    cudnn.allow_tf32, cudnn.deterministic = before[0] and not on_gpu, before[1] or on_gpu
    yield
    cudnn.allow_tf32, cudnn.deterministic = before


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Nothing the package does, or its tests, needs another machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        host = address[0] if self.family in (socket.AF_INET, socket.AF_INET6) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise AssertionError(f"the network was asked for: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def off_checkout(monkeypatch):
    """`python -m pytest` puts the checkout on the path, where transformers takes its kernels/ for another package."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT])


@pytest.fixture(scope="session")
def goldens_dir() -> Path:
    """Numbers recorded from the published implementation, beside the checkout."""
    if not GOLDENS.is_dir():
        pytest.skip(f"recorded numbers are not at {GOLDENS}")
    return GOLDENS


@pytest.fixture
def amed(capsys):
    """Runs the command line in this process: arguments -> exit code, stdout, stderr."""

    def run(*args) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        return (ended.value.code, *capsys.readouterr())

    return run


def make_tiny(label_dim: int = 0, seed: int = 0) -> EDMPrecond:
    """A U-Net for (1, 8, 8) with random weights, its last convolution included, and a bottleneck of 8 x 4 x 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EDMPrecond(
            img_resolution=8,
            img_channels=1,
            label_dim=label_dim,
            sigma_min=0.002,
            sigma_max=80.0,
            model_type="SongUNet",
            model_channels=8,
            channel_mult=[1, 1],
            channel_mult_emb=2,
            num_blocks=1,
            attn_resolutions=[],
        )
        # As published, the last layer of every branch starts near zero: the network would ignore noise and labels.
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.abs().max() < 1e-3:
                torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    return model.eval()


@pytest.fixture
def tiny_model() -> EDMPrecond:
    """Unconditional."""
    return make_tiny()


@pytest.fixture
def tiny_conditional() -> EDMPrecond:
    """Ten classes."""
    return make_tiny(label_dim=10)


def gaussian(sd: float = 0.5, mean: float = 0.25) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact denoiser of data from N(mean, sd²) in every pixel: D = (x sd² + mean sigma²) / (sd² + sigma²)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = sigma.reshape(-1, *[1] * (x.dim() - 1)) ** 2
        return (x * sd**2 + mean * variance) / (sd**2 + variance)

    return denoise


@pytest.fixture
def gaussian_denoiser() -> Callable[[Tensor, Tensor], Tensor]:
    """Of N(0.25, 0.5²), where the probability-flow ODE has the solution x - mean ∝ sqrt(sd² + sigma²)."""
    return gaussian()


# ---- CUDA without a GPU


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    """amed_cuda.so of the same sources for host memory; undefined behaviour, unaligned accesses among it, ends the process."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    tools, library = ROOT / "csrc/tests/emulated", tmp_path_factory.mktemp("emulated") / "amed_cuda.so"
    # Trapping instead of a message: pytest prints the Python stack of a signal, and swallows what a library writes.
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    options += ["-shared", "-fPIC"]
    sources = [*(ROOT / "csrc/cuda").glob("*.cu"), tools / "by_name.cpp", f"-I{ROOT / 'csrc/include'}"]
    command = [sys.executable, tools / "nvcc.py", *options, "-o", library, *sources]
    subprocess.run([str(word) for word in command], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def emulated_kernel(emulated) -> Callable[[str], Callable]:
    """name -> kernel(grid, block, arguments, shared_mem=0), as CuPy's RawModule.get_function gives it."""

    def get_function(name: str):
        def kernel(grid, block, arguments, shared_mem=0):
            shape = (ctypes.c_uint * 4)(grid[0], grid[1] if len(grid) > 1 else 1, block[0], shared_mem)
            address = ctypes.cast(getattr(emulated, name), ctypes.c_void_p)
            values = [argument.tobytes() for argument in arguments]
            assert getattr(emulated, f"launch_{name.split('_')[1]}")(address, shape, *values) == 0

        return kernel

    return get_function


class Recording:
    """Recomputes into the same memory, as a replayed graph does."""

    def __init__(self, work, output):
        self.work, self.output, self.alive = work, output, True

    def replay(self):
        assert self.alive, "replayed after reset"
        with torch.no_grad():
            self.output.copy_(self.work())

    def reset(self):
        self.alive = False


class Double:
    """`amed_engine.engine.capture.Device` without a GPU. Recording runs nothing the caller can see, as under capture."""

    def __init__(self):
        self.log, self.recordings, self.outer, self.fail_at, self.broken = [], [], False, None, False

    def capturing(self):
        return self.outer

    def side_stream(self, work):
        result = work()
        self.log.append(("warm", len(result)))
        return result

    def record(self, work):
        if self.fail_at == len(self.recordings):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        output = torch.full_like(work(), float("nan"))
        recording = Recording((lambda: torch.zeros_like(output)) if self.broken else work, output)
        self.recordings.append(recording)
        self.log.append(("record", len(output)))
        return recording, output

    def begin_use(self):
        self.log.append(("begin", None))

    def end_use(self):
        self.log.append(("end", None))

    def reserved_bytes(self):
        return 100 * len(self.recordings)

    def wait(self):
        self.log.append(("wait", None))

    def drop(self, recordings):
        for recording in recordings:
            recording.reset()
        self.log.append(("drop", None))


@pytest.fixture
def double():
    return Double()
