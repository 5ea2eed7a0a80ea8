"""Routes over a wire: Triton's Python backend in this process, LitServe and Ray Serve over loopback."""

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
from contextlib import ExitStack
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import torch
from harness import Unavailable
from PIL import Image
from routes import BUNDLED, CLASS, GREY_LEVEL, NFE, Bench, Draw, Route
from torch import Tensor

from amed_engine.integrations.serving.triton import TritonPythonModel

STARTUP = 120.0  # seconds


def triton(bench: Bench, stack: ExitStack) -> Draw:
    """One request for the whole batch through the model of the Python backend."""
    utils = SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: request[name],
        Tensor=lambda name, array: array,
        InferenceResponse=lambda output_tensors: output_tensors,
    )
    sys.modules["triton_python_backend_utils"] = utils  # type: ignore[assignment]
    stack.callback(sys.modules.pop, "triton_python_backend_utils", None)
    options = json.dumps({"model": BUNDLED, "nfe": NFE, "backend": "eager"})
    config = json.dumps({"parameters": {"sampler": {"string_value": options}}})
    model = TritonPythonModel()
    model.initialize({"model_config": config, "model_instance_kind": "CPU", "model_instance_device_id": "0"})
    columns = {"SEEDS": torch.arange(bench.batch), "CLASS_LABELS": torch.full((bench.batch,), CLASS)}
    request = {name: SimpleNamespace(as_numpy=column[:, None].numpy) for name, column in columns.items()}
    return lambda: torch.from_numpy(model.execute([request])[0][0])


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
    _await_health(f"http://127.0.0.1:{port}/health", server)
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def drawn(url: str, batch: int) -> Tensor:
    """One request, its answer's PNG files decoded to values in [0, 1], (B, H, W[, C])."""
    body = json.dumps({"seeds": list(range(batch)), "class_labels": CLASS}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        files = json.load(response)["images"]
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) for file in files])
    return torch.from_numpy(pictures.reshape(batch, *pictures.shape[1:3], -1)).double() / 255


def _await_health(url: str, server: subprocess.Popen) -> None:
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
        "Triton Inference Server",
        "integrations/triton.md",
        "the server; here a stand-in calls its model",
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
