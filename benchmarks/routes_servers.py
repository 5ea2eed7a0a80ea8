"""Routes over a wire, loopback: Triton Inference Server, LitServe and Ray Serve."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, suppress
from importlib.util import find_spec

import numpy as np
import torch
from harness import Unavailable
from PIL import Image
from routes import BUNDLED, CLASS, GREY_LEVEL, NFE, Bench, Draw, Route, temporary_folder
from torch import Tensor

from amed_engine.errors import MissingDependency
from amed_engine.integrations.serving.triton import write_repository
from amed_engine.integrations.serving.tritonserver import serving

STARTUP = 120.0  # seconds


def triton(bench: Bench, stack: ExitStack) -> Draw:
    """The server on a repository as its page writes it."""
    repository = temporary_folder(stack)
    write_repository(repository, model=BUNDLED, nfe=NFE)
    try:
        address = stack.enter_context(serving(repository, free_port(), subprocess.DEVNULL))
    except MissingDependency as error:
        raise Unavailable(str(error)) from error
    return lambda: inferred(f"{address}/v2/models/amed/infer", bench.batch)


def litserve(bench: Bench, stack: ExitStack) -> Draw:
    """The example as its page starts it, in processes of its own."""
    if find_spec("litserve") is None:
        raise Unavailable("litserve is not installed")
    port = free_port()
    module = "amed_engine.integrations.serving.litserve"
    command = [sys.executable, "-P", "-m", module, "--model", BUNDLED, "--nfe", str(NFE), "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, start_new_session=True, **quiet)
    stack.callback(lambda: (os.killpg(server.pid, signal.SIGKILL), server.wait()))
    await_health(f"http://127.0.0.1:{port}/health", server)
    return lambda: drawn(f"http://127.0.0.1:{port}/predict", bench.batch)


def ray(bench: Bench, stack: ExitStack) -> Draw:
    """One replica on a cluster of this machine alone."""
    if find_spec("ray") is None:
        raise Unavailable("ray is not installed")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 unless told: its processes would stand back here
    import ray
    from ray import serve

    from amed_engine.integrations.serving.ray import build

    port = free_port()
    # Closed in reverse: what was started first ends last.
    stack.callback(ray.shutdown)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    stack.callback(serve.shutdown)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"model": BUNDLED, "nfe": str(NFE), "device": "cpu"}))
    return lambda: drawn(f"http://127.0.0.1:{port}/", bench.batch)


def free_port() -> int:
    """Below those that the system hands out, which another process of a server may be given before it listens."""
    for port in range(20000 + os.getpid() % 10000, 32768):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise Unavailable("no port is free")


def drawn(url: str, batch: int) -> Tensor:
    """One request, its answer's PNG files decoded to values in [0, 1], (B, H, W[, C])."""
    body = json.dumps({"seeds": list(range(batch)), "class_labels": CLASS}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        files = json.load(response)["images"]
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) for file in files])
    return torch.from_numpy(pictures.reshape(batch, *pictures.shape[1:3], -1)).double() / 255


def inferred(url: str, batch: int) -> Tensor:
    """One request of Triton's protocol, its answer's tensor in binary."""
    columns = {"SEEDS": [[k] for k in range(batch)], "CLASS_LABELS": [[CLASS]] * batch}
    rows = {"datatype": "INT64", "shape": [batch, 1]}
    inputs = [{"name": name, **rows, "data": data} for name, data in columns.items()]
    wanted = [{"name": "IMAGES", "parameters": {"binary_data": True}}]
    body = json.dumps({"inputs": inputs, "outputs": wanted}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
        answer, start = response.read(), int(response.headers["Inference-Header-Content-Length"])
    (told,) = json.loads(answer[:start])["outputs"]
    return torch.from_numpy(np.frombuffer(answer[start:], np.float32).reshape(told["shape"]).copy())


def await_health(url: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + STARTUP
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}")
        try:
            return urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server did not answer within {STARTUP:.0f} s")


HERE = "amed_engine/integrations/serving"
SERVERS = (
    Route(
        "Triton Inference Server, over loopback",
        "integrations/triton.md",
        "the server: NVIDIA's container or nvidia-pytriton",
        (f"{HERE}/triton.py",),
        "by_seeds",
        triton,
    ),
    Route(
        "LitServe, over loopback",
        "integrations/litserve.md",
        "litserve",
        (f"{HERE}/litserve.py",),
        "by_seeds",
        litserve,
        GREY_LEVEL,
        pictures=True,
    ),
    Route(
        "Ray Serve, over loopback",
        "integrations/ray.md",
        "ray",
        (f"{HERE}/ray.py",),
        "by_seeds_beside_ray",
        ray,
        GREY_LEVEL,
        pictures=True,
    ),
)
