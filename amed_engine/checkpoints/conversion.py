"""From the files that others publish to ours, without running anything of theirs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from amed_engine.checkpoints import first_stage, latent, openai_state
from amed_engine.checkpoints.amed import to_predictor
from amed_engine.checkpoints.contents import INDEX, needs_none, read_contents
from amed_engine.checkpoints.diffusers_folder import save_diffusers
from amed_engine.checkpoints.files import CONFIG_FILE, DIFFUSERS_FILE, WEIGHTS_FILE, check_savable, check_values
from amed_engine.checkpoints.native import KINDS, restore, save_model, save_predictor, save_tensors
from amed_engine.checkpoints.plain_data import Record
from amed_engine.checkpoints.records import module_tensors
from amed_engine.checkpoints.state_dicts import dictionaries, find_network
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.networks import EDMPrecond

OPENAI, CLASSIFIER = "openai_unet", "openai_classifier"
DIFFUSERS = re.compile(r"(?:^|\.)(?:(?:down|up)_blocks\.\d+\.(?:resnets|attentions)|transformer_blocks\.\d+)\.")
EDM = re.compile(r"(?:^|\.)(?:map_layer0|enc\.\d+x\d+_\w+)\.")


class Converted(NamedTuple):
    """Where it went, and one line about what it is."""

    path: Path
    description: str


class _Layout(NamedTuple):
    name: str
    fits: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any], Path, Path, Mapping[str, Any]], str]
    load: Callable[[Mapping[str, Any], Path, Mapping[str, Any]], nn.Module] | None = None  # None: it is no network
    suffix: str = ".safetensors"  # of what it becomes, "" for a directory
    own: str | None = None  # the key of a pickle that says all about itself; None: it takes settings


def convert(
    path: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    weights: str | None = None,
    max_bytes: int | None = None,
    **settings: Any,
) -> Converted:
    """Write a published checkpoint in this package's format.

    path: an AMED predictor or EDM network (.pkl), a state dict of guided-diffusion or the consistency models, or a
        latent-diffusion checkpoint; in a file (pickle, torch.save, safetensors), the index of shards, or a folder with one of
        these. What it is, is read from what it holds; what a trainer put round a state dict is taken off.
    out: a .safetensors file or a directory; None puts it beside the original.
    weights: of a file with several, "ema" for the averaged ones, "model" for the trained ones, or the place of one in the
        file; None takes the averaged ones where there are any.
    max_bytes: what the file's contents may have, unpacked; None: as many as itself, or 256 MiB where that is more.
    settings: constructor arguments that a bare state dict does not tell, e.g. image_size or num_head_channels.
    Raises UnsafeFileError where the file holds more than data, FileFormatError where its layout is not known, ConfigError.
    """
    path = Path(path)
    if out is not None:
        check_savable(out)
    opened = _open(path, settings, weights, max_bytes)
    target = _beside(path, opened.layout.suffix) if out is None else Path(out)
    written = {target, *(target / name for name in (WEIGHTS_FILE, CONFIG_FILE, DIFFUSERS_FILE))}
    if {file.resolve() for file in written} & {source.resolve() for source in opened.sources}:
        raise ConfigError(f"{path} would be replaced by its conversion; give that another name, out= or --out")
    return Converted(target, opened.layout.convert(opened.data, path, target, settings) + opened.chosen)


def _beside(path: Path, suffix: str) -> Path:
    """The original's name with another suffix; an index of shards and a folder have none of their own."""
    if path.is_dir():
        return path.resolve().with_name(f"{path.resolve().name}-converted{suffix}")
    return path.with_name(path.name.removesuffix(INDEX)).with_suffix(suffix)


def load_published(
    path: str | os.PathLike, *, weights: str | None = None, max_bytes: int | None = None, **settings: Any
) -> nn.Module:
    """The network of a published checkpoint, as `convert` reads it, without writing anything."""
    opened = _open(Path(path), settings, weights, max_bytes)
    if opened.layout.load is None:
        raise FileFormatError(f"{path} holds no network but an {opened.layout.name}")
    return opened.layout.load(opened.data, Path(path), settings)


class _Opened(NamedTuple):
    """A file by its layout. chosen: a word on which of its networks it is."""

    layout: _Layout
    data: dict
    sources: tuple[Path, ...]
    chosen: str = ""


def _open(path: Path, settings: Mapping[str, Any], weights: str | None, max_bytes: int | None = None) -> _Opened:
    data, sources = read_contents(path, max_bytes)
    opened = _as_published(data, sources, path, weights) or _unwrapped(data, sources, path, weights)
    if opened is None:
        raise FileFormatError(
            f"{path} has an unknown layout: {_keys(data)}; known are {'; '.join(layout.name for layout in LAYOUTS)}"
        )
    if settings and opened.layout.own:
        raise ConfigError(f"this file says all about itself; leave out {', '.join(sorted(settings))}")
    return opened


def _as_published(data: Any, sources: tuple[Path, ...], path: Path, weights: str | None) -> _Opened | None:
    """Of the pickles that say all about themselves."""
    layout = next((each for each in LAYOUTS if each.own and isinstance(data, dict) and each.fits(data)), None)
    if layout is not None and weights not in (None, layout.own):
        raise ConfigError(f"{path} has no {weights!r} weights: it is an {layout.name}; leave --weights out")
    return None if layout is None else _Opened(layout, data, sources)


def _unwrapped(data: Any, sources: tuple[Path, ...], path: Path, weights: str | None) -> _Opened | None:
    """Of state dicts, as trainers keep them."""
    if (found := find_network(data, path, weights)) is None:
        return None
    network, chosen = found
    state = network.state()
    return _Opened(next(each for each in LAYOUTS if each.own is None and each.fits(state)), state, sources, chosen)


def _keys(data: Any) -> str:
    if not isinstance(data, dict):
        return f"it holds a {data.kind if isinstance(data, Record) else type(data).__name__}"
    names = [f"{key} ({data[key].kind})" if isinstance(data[key], Record) else str(key)[:60] for key in data]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    told = f"it has the keys {', '.join(names[:20]) or '(none)'}{more}"
    inner = [str(name) for _, own in dictionaries(data) for name in own]
    if any(map(DIFFUSERS.search, inner)):
        return f"{told}; they are of {needs_none('network')}"
    if any(map(EDM.search, inner)):
        told += "; they are of an EDM network, whose tensors alone do not tell how it is made: convert its pickle, or "
        told += "load them into an amed_engine.networks.EDMPrecond of its arguments"
    return told


def _is(key: str, kind: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda data: isinstance(data.get(key), Record) and data[key].kind == kind


def _predictor(data: Mapping[str, Any], path: Path, out: Path, settings: Mapping[str, Any]) -> str:
    tensors = _finite(module_tensors(data["model"]), path)
    predictor = to_predictor(data["model"], data.get("loss_fn"), tensors, path)
    save_predictor(predictor, out)
    return f"AMED predictor: {predictor.plan.describe() if predictor.plan else ''}"


def _edm(data: Mapping[str, Any], path: Path, out: Path, settings: Mapping[str, Any]) -> str:
    model = edm_network(data["ema"], path)
    save_model(model, out)
    size = f"{model.img_channels}x{model.img_resolution}x{model.img_resolution}"
    return f"EDM network ({model.model_type}) for {size}, {model.label_dim or 'no'} classes"


def _load_edm(data: Mapping[str, Any], path: Path, settings: Mapping[str, Any]) -> nn.Module:
    return edm_network(data["ema"], path)


def edm_network(record: Record, path: Path) -> EDMPrecond:
    """The network that a published EDM pickle describes: its recorded constructor arguments and its tensors."""
    state = record.state if isinstance(record.state, dict) else {}
    positional, named = state.get("_init_args") or (), state.get("_init_kwargs")
    if not isinstance(named, dict) or not isinstance(positional, (tuple, list)):
        raise FileFormatError(f"{path}: its network does not say how it was constructed (_init_kwargs)")
    make = partial(EDMPrecond, *positional)  # its arguments are those of the published constructor, in their order
    return restore(make, named, _finite(module_tensors(record), path), path).eval()


def _openai_parts(data: Mapping[str, Any], path: Path, settings: Mapping[str, Any]) -> tuple[dict, dict[str, Tensor]]:
    """(constructor arguments, tensors)"""
    tensors = _finite({name: value for name, value in data.items() if isinstance(value, Tensor)}, path)
    return openai_state.infer_config(tensors, path, settings), tensors


def _openai(data: Mapping[str, Any], path: Path, out: Path, settings: Mapping[str, Any], *, kind: str = OPENAI) -> str:
    config, tensors = _openai_parts(data, path, settings)
    save_tensors(kind, config, tensors, out, path)
    size = f"{config['in_channels']}x{config['image_size']}x{config['image_size']}"
    if kind == CLASSIFIER:
        return f"classifier of guided-diffusion for {size}, {config['out_channels']} classes"
    heads = "" if settings.keys() & {"num_heads", "num_head_channels"} else f", {_heads(config)}"
    return f"U-Net of guided-diffusion for {size}{heads}"


def _heads(config: Mapping[str, Any]) -> str:
    """The size of attention heads, which no tensor tells."""
    heads, channels = config.get("num_heads"), config["num_head_channels"]
    size = f"{heads} attention heads" if channels == -1 else f"attention heads of {channels} channels"
    return f"{size}, as published ones have (else --set num_head_channels=)"


def _load_openai(data: Mapping[str, Any], path: Path, settings: Mapping[str, Any], *, kind: str = OPENAI) -> nn.Module:
    return restore(KINDS[kind], *_openai_parts(data, path, settings), path).eval()


def _latent_parts(
    data: Mapping[str, Any], path: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict | None]:
    """(tensors, settings of a U-Net without a condition; None for one with)"""
    tensors = latent.unet_tensors(data["state_dict"])
    plain = openai_state.is_unet(tensors) and not latent.has_context(tensors)
    named = {} if first_stage.tensors_of(data["state_dict"]) else openai_state.named_size(path)  # it is that of images
    return _finite(tensors, path), {**latent.UNCONDITIONAL, **named, **settings} if plain else None


def _latent(data: Mapping[str, Any], path: Path, out: Path, settings: Mapping[str, Any]) -> str:
    """The network, and beside it the first stage where the file has one; neither is written unless both can be."""
    own = {name: value for name, value in settings.items() if name != "first_stage"}
    tensors, plain = _latent_parts(data, path, own)
    vae = first_stage_of(data["state_dict"], path) if settings.get("first_stage", True) else None
    said = latent.save(latent.build(tensors, path, own), out) if plain is None else _openai(tensors, path, out, plain)
    if vae is None:
        return said
    folder = first_stage.folder_beside(out)
    save_diffusers(vae, folder)
    return f"{said}; its first stage, a {type(vae).__name__} of diffusers, is in {folder}"


def _load_latent(data: Mapping[str, Any], path: Path, settings: Mapping[str, Any]) -> nn.Module:
    tensors, plain = _latent_parts(data, path, settings)
    return latent.build(tensors, path, settings) if plain is None else _load_openai(tensors, path, plain)


def first_stage_of(state: Mapping[str, Any], path: Path) -> Any:
    """The autoencoder in a latent-diffusion state dict, None where it has none."""
    tensors = first_stage.tensors_of(state)
    return first_stage.build(_finite(tensors, path), state.get("scale_factor"), path) if tensors else None


def load_first_stage(path: str | os.PathLike) -> nn.Module:
    """The autoencoder (AutoencoderKL or VQModel of diffusers) of latents: out of a latent-diffusion checkpoint (.ckpt), or
    from the directory that `convert` wrote beside the network. Raises ConfigError, FileFormatError, UnsafeFileError.
    """
    if Path(path).is_dir():
        return first_stage.load(Path(path))
    opened = _open(Path(path), {}, None)
    found = first_stage_of(opened.data["state_dict"], Path(path)) if opened.layout.convert is _latent else None
    if found is None:
        raise FileFormatError(f"{path} holds no first stage of latent diffusion (first_stage_model.*)")
    return found


def _finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        check_values(path, name, tensor)
    return tensors


LAYOUTS = (
    _Layout("AMED predictor (model: AMED_predictor, loss_fn)", _is("model", "AMED_predictor"), _predictor, own="model"),
    _Layout("EDM network (ema: EDMPrecond)", _is("ema", "EDMPrecond"), _edm, _load_edm, own="ema"),
    _Layout(
        "guided-diffusion or consistency U-Net (time_embed.*, input_blocks.*, out.*)",
        openai_state.is_unet,
        _openai,
        _load_openai,
    ),
    _Layout(
        "guided-diffusion classifier (time_embed.*, input_blocks.*, out.2.positional_embedding)",
        openai_state.is_classifier,
        partial(_openai, kind=CLASSIFIER),
        partial(_load_openai, kind=CLASSIFIER),
    ),
    _Layout(
        "latent-diffusion checkpoint (state_dict with model.diffusion_model.*)", latent.fits, _latent, _load_latent, ""
    ),
)
