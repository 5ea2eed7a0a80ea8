"""What `wrap` returns as a directory: the network's weights, and in config.json and wrap.safetensors how it was wrapped.

A network of this package lies in model.safetensors, one of diffusers in network/, as its own save_pretrained writes it. Nothing
in the directory is code: the classes that it may name are those listed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.adapters import (
    EDM,
    IDDPM,
    VE,
    VP,
    Adapter,
    Consistency,
    DiscreteSteps,
    Family,
    Flow,
    Score,
    VPScore,
    wrap,
)
from amed_engine.adapters.fingerprint import digest, fingerprint
from amed_engine.adapters.karras import ConsistencyFunction, Denoising
from amed_engine.adapters.score import IndexedScore
from amed_engine.checkpoints.diffusers_folder import held, open_diffusers, save_diffusers
from amed_engine.checkpoints.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_text,
    pack,
    publish,
    read_config,
    read_file,
    read_signed_config,
)
from amed_engine.checkpoints.hashes import Hashes, check_pair, settled
from amed_engine.checkpoints.native import KINDS, restore, versions
from amed_engine.errors import ConfigError, FileFormatError, require
from amed_engine.networks import EDMPrecond, OpenAIUNet
from amed_engine.networks.arguments import check_sigmas
from amed_engine.sampling.modules import bare, bound, gathered, unknown_wrapper, whole
from amed_engine.solvers.arguments import in_range, is_bool, is_number
from amed_engine.solvers.arguments import told as short

KIND = "wrapped_network"
WRAP_FILE, FOLDER = "wrap.safetensors", "network"
OWN: dict[type[nn.Module], str] = {EDMPrecond: "edm_precond", OpenAIUNet: "openai_unet"}
DIFFUSERS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "SD3Transformer2DModel")
FAMILIES: dict[type[Family], Callable[[Any], dict[str, Any]]] = {
    DiscreteSteps: lambda family: {"prediction": family.name},
    Denoising: lambda family: {},
    EDM: lambda family: {"sigma_data": float(family.sigma_data), "v_prediction": family.v_prediction},
    Consistency: lambda family: {"sigma_data": float(family.sigma_data), **_boundary(family)},
    ConsistencyFunction: lambda family: {},
    Flow: lambda family: {"steps": family.steps},
    VP: lambda family: {"beta_d": family.vp.beta_d, "beta_min": family.vp.beta_min, "steps": family.steps},
    VE: lambda family: {},
    IDDPM: lambda family: {"steps": family.steps},
    Score: lambda family: {"time": family.told},
    VPScore: lambda family: {"beta_d": family.betas[0], "beta_min": family.betas[1], "steps": family.steps},
    IndexedScore: lambda family: {},
}
# Families of a table, and the tensor that it is in the file and in the family.
TABLES: dict[type[Family], str] = {DiscreteSteps: "log_alpha", IndexedScore: "levels"}
CONDITION = "condition."
MAX_STEPS = 100_000  # of a family in a file, which may go through them one by one; and classes, as many wide are rows


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Save what `wrap` returned; `load_adapter` gives the same denoiser, bit for bit. Raises ConfigError, naming what to do."""
    network, tables = _plain(adapter), pack(_tables(adapter), {"kind": KIND})
    said = {
        "kind": KIND,
        "wrap": _said(adapter),
        "fingerprint": fingerprint(adapter),
        "tables": tables.sha256,
        **versions(),
    }
    if (kind := OWN.get(type(network))) is not None:
        own = {"kind": kind, "model": network.config}
        with gathered(adapter.network):
            weights = pack({name: whole(tensor) for name, tensor in network.state_dict().items()}, own)
        said |= {"network": kind, "model": network.config}
        files, sha256 = [(folder / WEIGHTS_FILE, weights.data)], weights.sha256
    else:
        dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
        told, sha256 = save_diffusers(network, folder / FOLDER)
        said |= {"network": type(network).__name__, "dtype": dtype, "network_configuration": told}
        files = []
    # Last: without it the directory is none of ours.
    config = (folder / CONFIG_FILE, config_text(said, sha256).encode())
    publish([(folder / WRAP_FILE, tables.data), *files, config])


def is_adapter(folder: Path) -> bool:
    """Whether a directory is one that `save_adapter` wrote."""
    return (folder / CONFIG_FILE).is_file() and read_config(folder).get("kind") == KIND


def load_adapter(folder: Path) -> Adapter:
    """The denoiser of a directory that `save_adapter` wrote. Raises FileFormatError, MissingDependency."""
    return settled(lambda: _load_adapter(folder))


def _load_adapter(folder: Path) -> Adapter:
    """Raises MixedError where the files are not those that the configuration names."""
    config, said = read_signed_config(folder)
    _, tables, own = read_file(folder / WRAP_FILE)
    if said is not None:
        found = own.tensors if own else digest(tables)
        check_pair(config.get("tables", "none"), found, folder / CONFIG_FILE, folder / WRAP_FILE)
    network = _network(folder, config, said)
    try:
        adapter = _wrapped(network, config["wrap"], tables)
        _check_said(config["wrap"], _said(adapter))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a ConfigError among them
        told = str(error)[:400]
        raise FileFormatError(f"{folder}: it cannot be wrapped as its {CONFIG_FILE} says: {told}") from error
    if fingerprint(adapter) != config.get("fingerprint"):
        raise FileFormatError(
            f"{folder}: its fingerprint is not the one that was saved: weights or settings were changed, or another version of "
            "diffusers builds another network; save it again"
        )
    return adapter


# ---- what is said of the wrapping ----


def _said(adapter: Adapter) -> dict[str, Any]:
    facts, family = adapter.facts, adapter.family
    levels = {name: _finite(getattr(adapter, name)) for name in ("sigma_min", "sigma_max")}
    return {
        "family": type(family).__name__,
        "arguments": _family_arguments(family),
        **({"steps": "integer"} if facts.whole_times else {}),
        **levels,
        "bottleneck": "auto" if adapter._found or facts.reduction is not None else adapter.bottleneck,
        "shape": None if adapter.sample_shape is None else list(adapter.sample_shape),
        "label_dim": facts.label_dim,
        "labels": facts.labels,
        "null_class": facts.null_class,
        "conditions": list(adapter.conditions.names),
        "bound": adapter.conditions.count,
        "has_null": adapter.conditions.has_null,
    }


def _check_said(told: dict[str, Any], made: dict[str, Any]) -> None:
    """Raise ConfigError for an entry that the denoiser would not be told by: of another type, or unknown."""
    for name, value in told.items():
        if name not in made or json.dumps(value, sort_keys=True) != json.dumps(made[name], sort_keys=True):
            raise ConfigError(f"{name!r} is {short(value)}, expected {made.get(name)!r}")


def _finite(level: float) -> float | None:
    """None for no end."""
    return float(level) if float(level) < float("inf") else None


def _boundary(family: Consistency) -> dict[str, Any]:
    """Where a consistency function is the identity."""
    return {} if family.boundary is None else {"sigma_min": family.boundary, "boundary": True}


def _family_arguments(family: Family) -> dict[str, Any]:
    if type(family) not in FAMILIES:
        raise ConfigError(
            f"{type(family).__name__} is no family that a directory can name; known are "
            f"{', '.join(kind.__name__ for kind in FAMILIES)}: save the network's weights, and wrap it where they are loaded"
        )
    arguments = FAMILIES[type(family)](family)
    if type(family) not in TABLES and type(family)(**arguments).settings() != family.settings():
        raise ConfigError(
            f"{type(family).__name__} has options that a directory does not hold; wrap the network anew instead"
        )
    return arguments


def _tables(adapter: Adapter) -> dict[str, Tensor]:
    names = adapter.conditions.names if adapter.conditions.count else ()
    bound = {CONDITION + name: getattr(adapter.conditions, f"table_{name}") for name in names}
    table = TABLES.get(type(adapter.family))
    return {**bound, **({} if table is None else {table: getattr(adapter.family, table)})}


def _plain(adapter: Adapter) -> Any:
    """The network itself, where a directory can hold it. Raises ConfigError."""
    network = bare(adapter.network)
    known = type(network) in OWN or type(network).__name__ in DIFFUSERS
    known = known and type(network).__module__.partition(".")[0] in ("amed_engine", "diffusers")
    if not known or bound(adapter.network):
        own = f"functools.partial of {type(network).__name__}" if known else type(network).__name__
        raise ConfigError(
            f"save_pretrained saves what wrap made of EDMPrecond, OpenAIUNet, {', '.join(DIFFUSERS)}, which are built again "
            f"without code from a file, got {own}; save its weights yourself and wrap it where they are loaded, or write the "
            "whole denoiser as a graph: amed_engine.adapters.save_program(denoiser, 'model.pt2')"
        )
    if (unknown := unknown_wrapper(adapter.network)) is not None:
        raise ConfigError(
            f"{type(unknown[0]).__name__} may compute something, which a directory of the network alone would lose; wrap its "
            f".{unknown[1]} instead"
        )
    if len({parameter.dtype for parameter in network.parameters()}) > 1 or not network.state_dict():
        raise ConfigError("the network's parameters are of several dtypes, which no directory tells; save it in one")
    return network


# ---- and read back ----


def _network(folder: Path, config: dict[str, Any], said: Hashes | None) -> nn.Module:
    kind: Any = config.get("network")
    if kind in OWN.values():
        told, tensors, own = read_file(folder / WEIGHTS_FILE)
        if said is not None:
            found = own.tensors if own else digest(tensors)
            check_pair(said.tensors, found, folder / CONFIG_FILE, folder / WEIGHTS_FILE)
        if told.get("network", told.get("kind")) != kind:
            raise FileFormatError(f"{folder}: {WEIGHTS_FILE} holds {told.get('kind')!r}, {CONFIG_FILE} says {kind!r}")
        module = restore(KINDS[kind], config.get("model"), tensors, folder)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name in tensors:
                tensor.data = tensor.data.to(tensors[name].dtype)
        return module.eval()
    if kind not in DIFFUSERS or not isinstance(config.get("dtype"), str):
        raise FileFormatError(
            f"{folder} holds a network {short(kind)}, expected one of {', '.join((*OWN.values(), *DIFFUSERS))}"
        )
    diffusers = require("diffusers", "diffusers", f"a {kind}")
    dtype = getattr(torch, config["dtype"], None)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise FileFormatError(f"{folder}: dtype {config['dtype'][:20]!r} is not known")
    with held(folder / FOLDER) as (same, own):
        if said is not None:
            expected = Hashes(config.get("network_configuration", "none"), said.tensors)
            check_pair(str(expected), str(own), folder / CONFIG_FILE, folder / FOLDER, "a network")
        network = open_diffusers(getattr(diffusers, kind), same, folder / FOLDER, kind)
    return network.to(dtype)


def _wrapped(network: nn.Module, said: dict[str, Any], tables: dict[str, Tensor]) -> Adapter:
    bound: Any = {name.removeprefix(CONDITION): table for name, table in tables.items() if name.startswith(CONDITION)}
    null = {name: table[-1:] for name, table in bound.items()} if said["has_null"] else None
    bound = {name: table[:-1] for name, table in bound.items()} if said["has_null"] else bound
    in_range("its network", "label_dim", said["label_dim"], 0, MAX_STEPS)
    adapter = wrap(
        network,
        _family(said, tables),
        steps=said.get("steps"),
        bottleneck=said["bottleneck"],
        shape=None if said["shape"] is None else tuple(said["shape"]),
        label_dim=said["label_dim"] or None,
        labels=said["labels"] if said["label_dim"] else None,
        null_class=said["null_class"],
        conditions=(bound if said["bound"] else said["conditions"]) or None,
        null_conditions=null,
        verify=False,
    )
    adapter.sigma_min, adapter.sigma_max = _levels(said)
    return adapter


def _family(said: dict[str, Any], tables: dict[str, Tensor]) -> Family:
    make = next((kind for kind in FAMILIES if kind.__name__ == said["family"]), None)
    if make is None:
        raise ConfigError(f"family {str(said['family'])[:40]!r} is not known")
    if make is DiscreteSteps:
        family = DiscreteSteps.of_table(said["arguments"]["prediction"], tables[TABLES[make]])
    else:
        family = make(*(tables[TABLES[make]],) if make in TABLES else (), **_arguments(said))
    family.sigma_min, family.sigma_max = _levels(said)
    return family


def _arguments(said: dict[str, Any]) -> dict[str, Any]:
    """Of a family, which may count its steps one by one."""
    arguments = said["arguments"]
    if not 0 < is_number("its family", "steps", arguments.get("steps", 1)) <= MAX_STEPS:
        raise ConfigError(f"its family has {short(arguments['steps'])} steps, expected up to {MAX_STEPS}")
    for name in arguments.keys() & {"v_prediction", "boundary"}:
        is_bool("its family", name, arguments[name])
    return arguments


def _levels(said: dict[str, Any]) -> tuple[float, float]:
    low, high = said["sigma_min"], float("inf") if said["sigma_max"] is None else said["sigma_max"]
    check_sigmas("its range", low, high)
    return float(low), float(high)
