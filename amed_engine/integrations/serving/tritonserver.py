"""NVIDIA Triton Inference Server out of the wheel nvidia-pytriton, for this very Python and without a container.

    pip install --no-deps nvidia-pytriton
    python -m amed_engine.integrations.serving.tritonserver models --port 8000

--no-deps: the server needs none of what that wheel brings, which would hold NumPy below 2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import click

from amed_engine.errors import AmedError, ConfigError, MissingDependency

SECONDS = 120.0  # until it is ready: each model opens its weights


@contextmanager
def serving(repository: str | os.PathLike, port: int, log: IO[bytes] | int | None = None) -> Iterator[str]:
    """The server's address on loopback, ready to answer, while the `with` block lasts.

    log: what the server says goes to that file (or `subprocess.DEVNULL`), else to this process's output. Raises
    MissingDependency, ConfigError.
    """
    if not Path(repository).is_dir():
        raise ConfigError(f"{os.fspath(repository)!r} is no folder; write_repository(...) makes one")
    package = _package()
    with TemporaryDirectory() as folder:
        command = [str(package / "tritonserver/bin/tritonserver"), f"--model-repository={os.fspath(repository)}"]
        command += [f"--backend-directory={_backends(package, Path(folder))}", "--allow-grpc=false"]
        command += ["--allow-metrics=false", "--http-address=127.0.0.1", f"--http-port={port}"]
        # A group of its own: the server's processes for Python end with it.
        process = subprocess.Popen(
            command,
            env=_environment(package),
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _await_ready(process, port)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(process)


def _package() -> Path:
    """The folder of the wheel, whose modules are not imported."""
    spec = find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency("this needs the server, which is not installed: pip install --no-deps nvidia-pytriton")
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        raise MissingDependency(
            "the server embeds Python, and this one was built without its shared library; use one with --enable-shared"
        )
    return Path(spec.submodule_search_locations[0])


def _backends(package: Path, folder: Path) -> Path:
    """The Python backend beside the program that runs models in this version of Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise MissingDependency(f"this nvidia-pytriton has no backend for Python {version}; install a version that has")
    shutil.copytree(package / "tritonserver/backends", folder / "backends")
    shutil.copy(stub, folder / "backends/python")
    return folder / "backends"


def _environment(package: Path) -> dict[str, str]:
    """Models find this Python, virtual environments too, by PATH, and its library and the server's by the other."""
    libraries = [str(package.parent / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    paths = {"PATH": [str(Path(sys.executable).parent)], "LD_LIBRARY_PATH": libraries}
    joined = {name: os.pathsep.join([*own, *filter(None, [os.environ.get(name)])]) for name, own in paths.items()}
    return {**os.environ, **joined}


def _await_ready(process: subprocess.Popen, port: int) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ConfigError(f"the server ended with status {process.returncode}; its own messages say why")
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1).close()
        except OSError:
            time.sleep(0.1)
    raise ConfigError(f"the server was not ready within {SECONDS:.0f} s; its own messages say why")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@click.command()
@click.argument("repository", type=click.Path(exists=True, file_okay=False))
@click.option("--port", default=8000, show_default=True)
def main(repository: str, port: int) -> None:
    """Serve a model repository on 127.0.0.1 until interrupted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with serving(repository, port) as address:
            click.echo(f"ready: {address}")
            signal.pause()
    except AmedError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
