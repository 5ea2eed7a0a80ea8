"""`amed serve`: samples over HTTP."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import click

from amed_engine.cli.console import Failure, Interrupted
from amed_engine.cli.options import default_device


def parse_buckets(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """1,2,4,8."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers; write e.g. 1,2,4,8", context, option) from None


def parse_models(context: click.Context, option: click.Parameter, models: tuple[str, ...]) -> dict[str, str]:
    """Names that they are served by, and where they are: NAME=PATH, or one word for both."""
    named: dict[str, str] = {}
    for text in models:
        name, equals, where = text.partition("=")
        name, where = (name, where) if equals and not os.path.exists(text) else (text, text)
        if not (name and where):
            raise click.BadParameter(f"{text!r} is no model; write a name, a path or NAME=PATH", context, option)
        if name in named:
            raise click.BadParameter(f"{name!r} is named twice; write NAME=PATH for another name", context, option)
        named[name] = where
    return named


def files_of(models: Iterable[str], option: str, given: Iterable[str]) -> dict[str, list[str]]:
    """What an option gives each model, from [NAME=]FILE: the name may be left out where one model is served. Raises
    click.UsageError."""
    files: dict[str, list[str]] = {name: [] for name in models}
    for text in given:
        # A name may hold = itself, as a path may.
        name = max((name for name in files if text.startswith(f"{name}=")), key=len, default=None)
        if name is not None and not os.path.exists(text):
            files[name].append(text[len(name) + 1 :])
        elif "=" in text and not os.path.exists(text):
            raise click.UsageError(
                f"{option} {text}: no such file, and no model {text.partition('=')[0]!r}; served are {', '.join(files)}"
            )
        elif len(files) > 1:
            raise click.UsageError(f"{option} {text}: whose? write NAME=FILE; served are {', '.join(files)}")
        else:
            next(iter(files.values())).append(text)
    return files


def _weights_of(models: Iterable[str], given: Iterable[str]) -> dict[str, str | None]:
    """Raises click.UsageError."""
    found = files_of(models, "--weights", given)
    for name, places in found.items():
        if len(places) > 1:
            raise click.UsageError(f"--weights of {name} are named twice: {', '.join(places)}; leave one of them out")
    return {name: places[0] if places else None for name, places in found.items()}


def _distinct(context: click.Context, option: click.Parameter, devices: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(devices)) < len(devices):
        raise click.BadParameter(
            "a device is named twice; --rows says how many samples it draws at once", context, option
        )
    return devices


def parse_grace(context: click.Context, option: click.Parameter, seconds: float) -> float:
    if not math.isfinite(seconds):
        raise click.BadParameter(f"{seconds} is no number of seconds to wait for", context, option)
    return seconds


POSITIVE = click.IntRange(min=1)


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=["digits"],
    callback=parse_models,
    metavar="[NAME=]MODEL",
    help="A bundled or published model's name, or a path; may be given several times.",
)
@click.option("--weights", multiple=True, metavar="[NAME=]PLACE", help="File or folder of a published model's weights.")
@click.option(
    "--predictor",
    "predictors",
    multiple=True,
    metavar="[NAME=]FILE",
    help="A predictor for what is asked of model NAME without a solver; may be given several times, once for each NFE.",
    show_default="the bundled ones",
)
@click.option("--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 for every one this machine has.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 for any that is free.")
@click.option("--rows", type=POSITIVE, default=64, help="Samples drawn at once, on each device.")
@click.option("--queue", type=click.IntRange(min=0), default=1024, help="Samples that may wait, for each device.")
@click.option(
    "--buckets",
    callback=parse_buckets,
    metavar="N,N,...",
    help="Sizes of batches.",
    show_default="powers of 2 on a GPU, elsewhere the rows that are live",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    callback=_distinct,
    help="Where to run: cpu, cuda:1 ...; may be given several times.",
    show_default="a GPU if there is one",
)
@click.option("--backend", type=click.Choice(["auto", "graph", "eager"]), default="auto", help="As of Sampler.")
@click.option("--compile", metavar="MODE", help="Of torch.compile, for the network.", show_default="none")
@click.option(
    "--autocast", type=click.Choice(["float16", "bfloat16"]), help="Of the network's arithmetic.", show_default="none"
)
@click.option("--threads", type=POSITIVE, help="Of torch on a CPU.", show_default="torch's")
@click.option(
    "--max-samples", type=POSITIVE, help="Of a request.", show_default="64, or rows and queue if that is less"
)
@click.option("--max-body", type=POSITIVE, default=1 << 20, help="Bytes of a request.")
@click.option("--max-nfe", type=POSITIVE, default=64, help="Evaluations of each sample.")
@click.option("--allow-programs", is_flag=True, help="Take predictors, recipes and noise levels from requests.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    callback=parse_grace,
    help="Seconds to finish in, after SIGTERM or Ctrl-C.",
)
def serve(
    models,
    weights,
    predictors,
    host,
    port,
    devices,
    threads,
    max_samples,
    max_body,
    max_nfe,
    allow_programs,
    grace,
    **asked,
) -> None:
    """Draw samples for others, over HTTP.

    There are no users and no TLS here; put what has them in front. SIGTERM and Ctrl-C finish what is asked for, a second
    one stops at once.
    """
    most = asked["rows"] + asked["queue"]
    max_samples = min(64, most) if max_samples is None else max_samples
    if max_samples > most:
        raise click.UsageError(
            f"--max-samples {max_samples} is more than the {most} that --rows and --queue hold together"
        )
    files, places = files_of(models, "--predictor", predictors), _weights_of(models, weights)
    own = {name: {"weights": places[name], "predictors": files[name]} for name in models}
    from amed_engine.serving.http import Limits, make_app
    from amed_engine.serving.http.run import Server, listener

    with listener(host, port) as bound, contextlib.ExitStack() as stack:
        engines = _engines(models, own, devices or (default_device(),), threads, asked, stack)
        app = make_app(
            engines, limits=Limits(body=max_body, samples=max_samples, nfe=max_nfe), allow_programs=allow_programs
        )
        where = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
        server = Server(
            app, grace, ready=lambda: click.echo(f"serving {', '.join(models)} on {where}"), close=stack.close
        )
        with _without_notices():
            server.run(sockets=[bound])
    if server.unanswered:
        count = server.unanswered
        lost = f"{count} request{'s were' if count > 1 else ' was'} not answered"
        if server.signals > 1:
            raise Interrupted(f"{lost} before the second signal")
        raise Failure(f"{lost} within --grace {grace:g}")


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """What the engine says of how a request is drawn is for its client, who is told the plan; without end in our log."""
    logger = logging.getLogger("amed_engine")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _engines(
    models: dict[str, str],
    own: dict[str, dict[str, Any]],
    devices: tuple[str, ...],
    threads: int | None,
    asked: dict[str, Any],
    stack: Any,
) -> dict[str, list[Any]]:
    """Of every model on every device; closed with the stack, without waiting for what they have to do. own: options of each."""
    import torch

    from amed_engine import ContinuousSampler

    if threads is not None:
        torch.set_num_threads(threads)
    asked["autocast"] = asked["autocast"] and getattr(torch, asked["autocast"])
    engines: dict[str, list[Any]] = {name: [] for name in models}
    for name, where in models.items():
        for device in devices:
            engines[name].append(ContinuousSampler(where, device=device, **own[name], **asked))
            stack.callback(engines[name][-1].close, drain=False)
    return engines
