"""Models and predictors in the native format, loaded strictly."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from amed_engine.checkpoints.files import MAX_PREDICTOR, read, write
from amed_engine.checkpoints.fit import without_memory
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.networks import EDMPrecond, OpenAIClassifier, OpenAIUNet
from amed_engine.sampling.modes import plain_defaults
from amed_engine.sampling.modules import bare, gathered, unknown_wrapper, whole
from amed_engine.sampling.predictors import Predictor
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.sampling.predictors.coefficient import CoefficientPredictor
from amed_engine.sampling.predictors.constant import ConstantPredictor
from amed_engine.solvers.plan import Plan

M = TypeVar("M", bound=nn.Module)
PREDICTORS: dict[str, Callable[..., Predictor]] = {
    "amed_predictor": AMEDPredictor,
    "constant_predictor": ConstantPredictor,
    "coefficient_predictor": CoefficientPredictor,
}
# Networks by what a file says it holds.
KINDS = {"edm_precond": EDMPrecond, "openai_unet": OpenAIUNet, "openai_classifier": OpenAIClassifier}


def save_predictor(predictor: Predictor, path: str | os.PathLike) -> None:
    """Save a predictor and the plan it was trained for, to one .safetensors file or a directory. Raises ConfigError."""
    kind = next((kind for kind, make in PREDICTORS.items() if make is type(predictor)), None)
    if kind is None:
        raise ConfigError(f"save_predictor takes {', '.join(PREDICTORS)}, got {type(predictor).__name__}")
    plan = None if predictor.plan is None else predictor.plan.to_json()
    write(path, predictor.state_dict(), {"kind": kind, "predictor": predictor.config, "plan": plan, **versions()})


def load_predictor(path: str | os.PathLike) -> Predictor:
    """A predictor saved by `save_predictor`, its plan restored. Raises FileFormatError or ConfigError."""
    config, tensors = read(path, MAX_PREDICTOR)
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in PREDICTORS:
        raise FileFormatError(f"{path} holds {kind!r}, expected a predictor: {', '.join(PREDICTORS)}")
    predictor = restore(PREDICTORS[kind], config.get("predictor"), tensors, path)
    if config.get("plan") is not None:
        try:
            predictor.plan = Plan.from_json(config["plan"])
        except ConfigError as error:
            raise FileFormatError(f"{path}: {error}") from error
    return predictor.eval()


def save_model(model: EDMPrecond, path: str | os.PathLike, **notes: Any) -> None:
    """Save a network of `amed_engine.networks`; notes (training time, loss ...) go into its configuration.

    What wraps it (torch.compile, AveragedModel, DistributedDataParallel, FSDP) is no part of the file. Raises ConfigError for
    another wrapper, which may compute something that the file would lose.
    """
    if (unknown := unknown_wrapper(model)) is not None:
        wrapper, child = unknown
        raise ConfigError(
            f"{type(wrapper).__name__} may compute something, which a file of the network alone would lose; if it passes its "
            f"calls on as they are, pass its .{child} instead"
        )
    with gathered(model):
        network = bare(model)
        tensors = {name: whole(tensor) for name, tensor in network.state_dict().items()}
        write(path, tensors, {"kind": "edm_precond", "model": network.config, **notes, **versions()})


def save_tensors(
    kind: str, arguments: dict[str, Any], tensors: dict[str, Tensor], path: str | os.PathLike, source: str | os.PathLike
) -> None:
    """Save a network that is not built: its kind, constructor arguments and tensors, checked against each other.

    source: the file they are from, of which errors speak.
    """
    _check_fit(KINDS[kind], arguments, tensors, source)
    write(path, tensors, {"kind": kind, "model": arguments, **versions()})


def load_model(path: str | os.PathLike) -> Any:
    """A network saved by `save_model` or written by `convert`, in evaluation mode."""
    config, tensors = read(path)
    kind = config.get("kind")
    if kind not in list(KINDS):  # a list: what the file says may be no key
        raise FileFormatError(f"{path} holds {kind!r}, expected {' or '.join(map(repr, KINDS))}")
    return restore(KINDS[kind], config.get("model"), tensors, path).eval()


def restore(make: Callable[..., M], arguments: Any, tensors: Mapping[str, Tensor], path: str | os.PathLike) -> M:
    """The module of these arguments with these tensors, and no others."""
    _check_fit(make, arguments, tensors, path)
    with plain_defaults(), torch.random.fork_rng(devices=[]):  # initial weights are drawn, only to be overwritten
        module = _build(make, arguments, path)
    module.load_state_dict(dict(tensors), strict=True)
    return module


def _check_fit(make: Callable[..., nn.Module], arguments: Any, tensors: Mapping[str, Tensor], path: Any) -> None:
    check_tensors(without_memory(lambda: _build(make, arguments, path), len(tensors)), tensors, path)


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """A FileFormatError for the first tensor that is missing, unexpected, misshapen or of another kind than the module's."""
    own = module.state_dict()
    if missing := sorted(own.keys() - tensors.keys()):
        raise FileFormatError(f"{path} lacks tensor {missing[0]!r} ({len(missing)} missing)")
    if unexpected := sorted(tensors.keys() - own.keys()):
        raise FileFormatError(f"{path} has unexpected tensor {unexpected[0]!r} ({len(unexpected)} unexpected)")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise FileFormatError(
                f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            )
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise FileFormatError(f"{path}: tensor {name!r} has dtype {tensor.dtype}, expected {own[name].dtype}")


def _build(make: Callable[..., M], arguments: Any, path: str | os.PathLike) -> M:
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise FileFormatError(f"{path}: its configuration names no constructor arguments")
    try:
        return make(**arguments)
    except Exception as error:  # whatever a constructor makes of arguments that a file claims, the file is at fault
        raise FileFormatError(f"{path}: its configuration does not build: {error}") from error


def versions() -> dict[str, str]:
    """What wrote a file."""
    try:
        own = version("amed-engine")
    except PackageNotFoundError:
        own = "unknown"
    return {"amed_engine": own, "torch": torch.__version__}
