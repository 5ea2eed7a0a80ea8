"""What commands share: options and their values, and the sampler that they ask for. Nothing heavy is imported before it is
needed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from amed_engine.cli.labels import label_option
from amed_engine.errors import AmedError, ConfigError
from amed_engine.solvers import alternatives, solver_names
from amed_engine.solvers.files import write_or_stream
from amed_engine.solvers.targets import check_folder, check_target, held, is_descriptor, is_stream


def parse_pairs(context: click.Context, option: click.Parameter, pairs: Sequence[str]) -> dict[str, Any]:
    """name=value, the value read as a number, true or false, or else as text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not (name and value):
            raise click.BadParameter(f"{pair!r} is not name=value; write e.g. max_order=3", context, option)
        try:
            options[name] = json.loads(value.lower())
        except ValueError:
            options[name] = value
    return options


def given_beside(names: Collection[str]) -> list[str]:
    """The options of the running command that were given, but for those of these names."""
    context = click.get_current_context()
    unasked = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP, None)
    given = [
        option for option in context.command.params if context.get_parameter_source(option.name or "") not in unasked
    ]
    return [option.opts[0] for option in given if option.name not in names]


Decorator = Callable[[Callable], Callable]


def options(*decorators: Decorator) -> Decorator:
    return lambda command: reduce(lambda done, add: add(done), reversed(decorators), command)


PAIRS: dict[str, Any] = {"multiple": True, "callback": parse_pairs, "metavar": "NAME=VALUE"}
where_options = options(
    click.option(
        "--model", "--network", "model", default="digits", help="A bundled or published model's name, or a path."
    ),
    click.option(
        "--weights",
        type=click.Path(exists=True),
        help="File or folder of a published model's weights.",
        show_default="AMED_WEIGHTS",
    ),
    click.option("--device", help="Where to run: cpu, cuda, cuda:1 ...", show_default="a GPU if there is one"),
)
range_options = options(
    click.option("--sigma-min", type=float, help="Noise level to end at.", show_default="the model's"),
    click.option("--sigma-max", type=float, help="Noise level to start from.", show_default="the model's"),
)
grid_options = options(
    click.option(
        "--schedule",
        help="time_uniform, polynomial, logsnr, discrete (over the network's own training steps), or a file of levels.",
        show_default="time_uniform with a solver by name (consistency: polynomial), else the best at hand",
    ),
    click.option("--rho", type=float, help="Exponent of the schedule.", show_default="1, of polynomial 7"),
)


def _no_first_step(context: click.Context, option: click.Parameter, value: bool) -> None:
    context.meta["amed.no_afs"] = value


def _first_step(context: click.Context, option: click.Parameter, value: str | None) -> bool | str | None:
    """As the engine takes it; None where nothing was asked for. Raises click.UsageError for both at once."""
    if context.meta.get("amed.no_afs") and value is not None:
        raise click.UsageError(f"--afs {value} and --no-afs exclude each other; leave one of them out")
    return False if context.meta.get("amed.no_afs") else {None: None, "zero": True, "mean": "mean"}[value]


first_step_options = options(
    click.option("--no-afs", is_flag=True, is_eager=True, expose_value=False, callback=_no_first_step, help="Never."),
    click.option(
        "--afs",
        is_flag=False,
        flag_value="zero",
        type=click.Choice(["zero", "mean"]),
        callback=_first_step,
        help="First evaluation analytic and free: for data about zero, or about the model's mean answer, measured now.",
        show_default="the best that needs no measuring; fit measures in any case",
    ),
)
plan_options = options(
    click.option("--solver-option", "solver_options", help="Option of the solver, e.g. max_order=3.", **PAIRS),
    grid_options,
    first_step_options,
)
sampler_options = options(
    click.option("--nfe", type=int, help="Network evaluations per sample.", show_default="the predictor's, or 5"),
    click.option(
        "--solver", help=f"{alternatives(solver_names('none', 'optional'))}.", show_default="the best at hand"
    ),
    plan_options,
    click.option(
        "--plan",
        type=click.Path(exists=True, dir_okay=False),
        help="A file that says all of these: a recipe of calibrate, search-schedule or Plan.save.",
    ),
)
condition_options = options(
    label_option,
    click.option(
        "--guidance", "guidance_scale", type=float, help="Strength of classifier-free guidance.", show_default="none"
    ),
    click.option(
        "--predictor",
        "--predictor_path",
        "predictor",
        help="Path of a predictor, or none to sample without.",
        show_default="the bundled one",
    ),
    click.option(
        "--dtype", type=click.Choice(["float32", "float64"]), default="float32", help="Of the sampling state."
    ),
)
drawing_options = options(
    condition_options,
    click.option("--batch", type=click.IntRange(min=1), default=64, help="Samples computed at once."),
)


def default_device() -> str:
    """A GPU if there is one, under torchrun this process's own."""
    import torch

    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    return gpu if torch.cuda.is_available() else "cpu"


def typed(asked: dict[str, Any]) -> dict[str, Any]:
    """The options as the engine takes them: device, dtype and noise levels."""
    import torch

    device, dtype = asked["device"] or default_device(), getattr(torch, asked["dtype"])
    return {**with_levels(asked), "device": device, "dtype": dtype}


def open_network(model: str, weights: str | None, device: str | None) -> Any:
    """The network that a command is to work on, on its device."""
    from amed_engine.engine.model import place
    from amed_engine.engine.resolve import resolve

    resolved = resolve(model, weights=weights)
    place(resolved, device or default_device())
    return resolved.network


def check_writable(*paths: str | Path | None, streams: bool = False) -> None:
    """Before the work rather than after it: make the folders, try to write to them, remove what killed runs left of the files.

    streams: a device or a FIFO will do too, and the FIFO is kept open; where it is our own output, text goes to stderr.
    """
    for path in filter(None, paths):
        with _writing_to(Path(path).parent):
            check_target(path, streams)
        if streams and is_stream(path):
            click.get_current_context().with_resource(held(path))
            if is_stdout(path):
                text_to_stderr()


def check_writable_folder(path: str | Path, *names: str) -> None:
    """The same for a folder and the files of these names in it."""
    with _writing_to(Path(path)):
        check_folder(path, *names)


def check_writable_model(path: str | Path) -> None:
    """The same for what is saved as a .safetensors file or a directory."""
    from amed_engine.checkpoints.files import check_savable

    if Path(path).suffix == ".safetensors":
        check_writable(path, streams=True)
    with _writing_to(Path(path) if Path(path).is_dir() else Path(path).parent):
        check_savable(path)


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AmedError(f"cannot write to folder {folder}: {error.strerror}; choose another") from error


def is_stdout(path: str | Path | None) -> bool:
    """Whether a name is one of this process's standard output: -, /dev/stdout ..."""
    if path is None or path == "-" or sys.stdout is None:
        return path == "-"
    return os.path.exists(path) and is_descriptor(path) and os.path.samestat(os.stat(path), os.fstat(1))


def text_to_stderr() -> None:
    """For the rest of the command: its output is a file."""
    click.get_current_context().with_resource(contextlib.redirect_stdout(sys.stderr))


def check_png(path: str | None) -> None:
    """Pictures are PNG, whatever the name says; a name of another kind is refused."""
    if path and Path(path).suffix.lower() not in ("", ".png"):
        raise click.UsageError(f"--out is written as PNG, got {path}; name it {Path(path).with_suffix('.png')}")


def show(found: Any, json_file: str | None) -> None:
    """Write a result as JSON to a file, and print it as a table; or print the JSON where the file is -."""
    text = json.dumps(found.to_json(), indent=2)
    if json_file and json_file != "-":
        write_or_stream(json_file, f"{text}\n".encode())
    click.echo(text if json_file == "-" else found.table())


def make_sampler(model: str, predictor: str | None, plan: str | None = None, **asked: Any) -> Any:
    """The sampler of a command's options; a schedule may be a file of noise levels, and a plan one that says all of them."""
    from amed_engine.engine.notices import warn_of_range
    from amed_engine.engine.sampler import Sampler

    given = typed(asked)
    sampler = Sampler(model, predictor, plan=plan, **given)
    if not isinstance(given["schedule"], (str, type(None))):
        warn_of_range(sampler.model, sampler.plan)  # levels of a file are no wish to leave others out
    return sampler


def with_levels(asked: dict[str, Any]) -> dict[str, Any]:
    """The options with a schedule that is a file read: its levels, its solver where none was asked for, its first step where
    neither that was nor another number of evaluations. Raises FileFormatError and ConfigError."""
    from amed_engine.checkpoints.levels import read_levels

    if (name := asked["schedule"]) is None or not (name.endswith(".json") or Path(name).is_file()):
        return asked
    if asked["rho"] is not None:
        raise ConfigError("rho is the exponent of a schedule by name, not of noise levels in a file; leave it out")
    plan, asked = read_levels(name), dict(asked)
    asked["schedule"] = plan.levels
    if asked["afs"] is None and asked.get("nfe") in (None, plan.nfe):
        asked["afs"] = plan.afs
    if asked.get("solver", plan.solver) is None:  # compare has all of them
        asked |= {"solver": plan.solver, "solver_options": asked["solver_options"] or dict(plan.options)}
    return asked
