"""A ComfyUI server for tests, and its HTTP API."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from safetensors.torch import load_file

HERE = Path(__file__).parents[1] / "integrations" / "comfyui_server"
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)


def script(checkout: Path, *arguments: object) -> list[str]:
    return [PYTHON, str(HERE / "run.py"), *map(str, (checkout, *arguments))]


class Refused(Exception):
    """What a node or the validation of a prompt said."""


class Server:
    """ComfyUI of a checkout on the CPU, with the nodes and the test's own, in a folder of its own."""

    def __init__(self, checkout: Path, base: Path, line: str):
        self.checkout, self.base, self.process = checkout, base, None
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        networks = base / "models" / "diffusion_models"
        subprocess.run(script(checkout, HERE / "checkpoints.py", networks), check=True, env=self.environment)
        (base / "custom_nodes" / "amed").mkdir(parents=True)
        (base / "custom_nodes" / "amed" / "__init__.py").write_text(line + "\n")
        shutil.copytree(HERE / "pack", base / "custom_nodes" / "pack")
        for folder in ("amed", "elsewhere"):
            (base / "models" / folder).mkdir()
        paths = f"mine:\n  base_path: {base}\n  amed: models/elsewhere\n"
        (base / "extra.yaml").write_text(paths)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        flags = ["--cpu", "--port", self.port, "--base-directory", self.base]
        flags += ["--extra-model-paths-config", self.base / "extra.yaml"]
        known = (self.checkout / "comfy" / "cli_args.py").read_text()
        for later, *value in (["--disable-api-nodes"], ["--database-url", "sqlite:///:memory:"]):
            flags += [later, *value] if later in known else []
        self.log = self.base / "server.log"
        command = script(self.checkout, self.checkout / "main.py", *flags)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.base, env=self.environment
            )
        for _ in range(240):
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended: {self.log.read_text()[-4000:]}")
            try:
                self.get("system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        else:
            raise RuntimeError(f"ComfyUI does not answer: {self.log.read_text()[-4000:]}")
        if re.search(r"IMPORT FAILED\).*custom_nodes", self.log.read_text()):
            raise RuntimeError(f"ComfyUI could not import our nodes: {self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str):
        return self._ask(path, None)

    def post(self, path: str, data: object):
        return self._ask(path, json.dumps(data).encode())

    def _ask(self, path: str, data: bytes | None):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or "null")

    def queue(self, graph: "Graph") -> str:
        try:
            return self.post("prompt", {"prompt": graph.nodes})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from error

    def wait(self, prompt: str) -> dict:
        for _ in range(1200):
            if prompt in (history := self.get(f"history/{prompt}")):
                return history[prompt]
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.1)
        raise RuntimeError(f"no answer in two minutes: {self.log.read_text()[-4000:]}")

    def run(self, graph: "Graph") -> dict:
        """The latents that the graph's SaveLatent nodes wrote, by node id. Raises Refused with a node's message."""
        done = self.wait(self.queue(graph))
        for kind, told in done["status"]["messages"]:
            if kind == "execution_error":
                raise Refused(told["exception_message"].strip())
        saved = {node: out["latents"][0] for node, out in done["outputs"].items() if "latents" in out}
        folder = self.base / "output"
        return {
            node: load_file(folder / file["subfolder"] / file["filename"])["latent_tensor"]
            for node, file in saved.items()
        }


class Graph:
    """A prompt: nodes by number, inputs are values or [node, output]."""

    def __init__(self):
        self.nodes = {}

    def add(self, kind: str, **inputs: object) -> str:
        name = str(len(self.nodes) + 1)
        linked = {key: [value, 0] if isinstance(value, Node) else value for key, value in inputs.items()}
        self.nodes[name] = {"class_type": kind, "inputs": linked}
        return Node(name)


class Node(str):
    """A node's number, which stands for its first output."""

    def __getitem__(self, output: int) -> list:
        return [str(self), output]
