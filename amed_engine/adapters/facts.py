"""What a network says of itself: how it is called, the shape of its samples, its classes and conditions.

Read from attributes and configurations, by the names of the published classes: nothing of diffusers is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from amed_engine.adapters.sequences import SEQUENCES, refuse, text
from amed_engine.errors import ConfigError
from amed_engine.sampling.modules import bare, bound, unknown_wrapper
from amed_engine.sampling.wrappers import takes_more

# Conditions that diffusers takes in a dictionary, added_cond_kwargs: SDXL's, and those of networks that are told a picture.
ADDED = ("text_embeds", "time_ids", "image_embeds")


@dataclass(frozen=True)
class NetworkFacts:
    """What is known of a network before it is called.

    shape: of a sample. out_channels: C, or 2C with learned variances. label_dim: classes, told to the network as one-hot
    "rows" or as an "index", or numbers per sample, told as a "float" (B,) or a "vector" (B, label_dim). null_class: the index
    that means no class. conditions: what the network must be given, with the width of each (None: not known, 0: one number
    per row). prediction, betas: what it is known, or by custom, trained for. diffusers: called by keywords, answers a tuple.
    returns_bottleneck: beside its output. denoises: needs no preconditioning. reduction: how many times smaller than the
    sample its own bottleneck is. whole_times: it is told whole-number times alone. axes: of a sample, "CHW", "CL", "CFHW" or
    "FCHW", "" where it takes any. channels: C, where shape does not tell. folds_frames: within, the frames of a sample
    follow each other in the batch, (B·F, C, h, w).
    """

    shape: tuple[int, ...] | None = None
    out_channels: int | None = None
    label_dim: int = 0
    labels: str = "rows"
    null_class: int | None = None
    conditions: dict[str, int | None] = field(default_factory=dict)
    prediction: str | None = None
    betas: str | None = None
    diffusers: bool = False
    returns_bottleneck: bool = False
    denoises: bool = False
    reduction: int | None = None
    whole_times: bool = False
    axes: str = ""
    channels: int | None = None
    folds_frames: bool = False

    @property
    def channel_axis(self) -> int:
        """Of a sample's shape."""
        return max(self.axes.find("C"), 0)

    @property
    def in_channels(self) -> int | None:
        return self.channels if self.shape is None else self.shape[self.channel_axis]

    @property
    def rank(self) -> str:
        """The shape of a sample, in letters and the number of channels where it is known."""
        return (", ".join(self.axes) or "C, ...").replace("C", str(self.channels or "C"))


def facts_of(network: Any) -> NetworkFacts:
    """The facts of a network, inside whatever passes its calls on; a callable that no reader knows has none."""
    facts, given = _read(bare(network)), bound(network)
    if not given:
        return facts
    # What functools.partial gives already is nothing that a call could choose.
    given |= set(ADDED) if "added_cond_kwargs" in given else set()
    conditions = {name: width for name, width in facts.conditions.items() if name not in given}
    classes = {"label_dim": 0, "null_class": None} if "class_labels" in given else {}
    return replace(facts, conditions=conditions, **classes)


def _read(network: Any) -> NetworkFacts:
    for ancestor in type(network).__mro__:
        if ancestor.__name__ in READERS:
            return READERS[ancestor.__name__](network)
        if ancestor.__name__ in SEQUENCES:
            return _of_diffusers(network, **SEQUENCES[ancestor.__name__](network))
    if isinstance(getattr(network, "middle_block", None), nn.Module) and hasattr(network, "in_channels"):
        return _guided_diffusion(network)
    if hasattr(network, "round_sigma") and hasattr(network, "img_channels"):  # EDM's classes for iDDPM, VP and VE
        return _edm(network)
    labels = getattr(network, "label_kind", None) or "rows"
    return NetworkFacts(label_dim=int(getattr(network, "label_dim", 0) or 0), labels=labels)


def check_known(network: Any) -> None:
    """Raise ConfigError for a class of diffusers that no reader here knows: each is called in its own way."""
    kinds = type(bare(network)).__mro__
    owner = next((kind for kind in kinds if "forward" in vars(kind)), object)
    names = {kind.__name__ for kind in kinds}
    if owner.__module__.partition(".")[0] != "diffusers" or "ModelMixin" not in names or names & {*READERS, *SEQUENCES}:
        return
    told = ", ".join(list(inspect.signature(owner.forward).parameters)[1:])  # type: ignore[attr-defined]
    raise ConfigError(
        f"{kinds[0].__name__} is a network of diffusers that wrap does not know how to call ({told}): wrap a module whose "
        "forward(x, t) calls it and returns the prediction alone, with prediction= and shape="
    )


def is_raw(network: Any) -> bool:
    """Whether it is known to need a preconditioning: a published network that is no denoiser."""
    inner = bare(network)
    known = {*READERS, *SEQUENCES} - {"OnnxModel"}
    names = {ancestor.__name__ for ancestor in type(inner).__mro__} & known
    return bool(names) and not _read(inner).denoises


def as_tuple(network: Any) -> dict[str, Any]:
    """How a network of diffusers is told to answer a tuple; nothing where a wrapper may take the answer apart itself."""
    return {} if unknown_wrapper(network) is not None else {"return_dict": False}


def check_classes_known(network: Any) -> None:
    """Raises ConfigError for a module without classes of its own that hands unnamed inputs to one that has some, perhaps."""
    module = bare(network)
    if getattr(module, "label_kind", None) and not getattr(module, "label_dim", 0):
        raise ConfigError(
            f"{type(module).__name__} takes labels and does not say how many there are; pass label_dim=: the number of "
            "classes, or of numbers per sample"
        )
    told = getattr(module, "label_dim", None) is not None or "class_labels" in bound(network)
    if told or not isinstance(module, nn.Module) or not takes_more(module):
        return
    for name, part in module.named_modules():
        if part is not module and _has_classes(part):
            raise ConfigError(
                f"{type(module).__name__} takes any inputs, so it cannot be known whether labels reach its .{name}, which has "
                f"classes; pass the module that is to be sampled (.{name}, say), or say label_dim=: the number of classes, 0 "
                "for none"
            )


def _has_classes(part: nn.Module) -> bool:
    config = getattr(part, "config", None)
    classes = getattr(part, "num_classes", None) if hasattr(part, "label_emb") else None
    counts = (getattr(part, "label_dim", None), classes, getattr(config, "num_class_embeds", None))
    return any(isinstance(count, int) and count > 0 for count in counts)


def _ours(network: Any) -> bool:
    """Whether it is of a class of this package, or of one made of it, as FSDP makes them."""
    return any(ancestor.__module__.startswith("amed_engine.") for ancestor in type(network).__mro__)


def square(channels: Any, size: Any) -> tuple[int, ...] | None:
    """(C, H, W) of a size that is a number, a pair or not told."""
    if channels is None or size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


def _edm(network: Any) -> NetworkFacts:
    shape = square(network.img_channels, network.img_resolution)
    own = _ours(network)
    label_dim = int(getattr(network, "label_dim", 0) or 0)
    reduction = network.img_resolution // network.bottleneck_shape[1] if own else None
    known = {"prediction": "denoised", "returns_bottleneck": own, "denoises": True, "reduction": reduction}
    return NetworkFacts(shape, network.img_channels, label_dim, **known)


def _raw_edm(network: Any) -> NetworkFacts:
    own = _ours(network)
    return NetworkFacts(label_dim=int(network.label_dim or 0), prediction="edm", returns_bottleneck=own)


def _openai(network: Any) -> NetworkFacts:
    shape = square(network.in_channels, network.image_size)
    reduction = network.image_size // network.bottleneck_shape[1]
    return NetworkFacts(
        shape, network.out_channels, network.num_classes or 0, returns_bottleneck=True, reduction=reduction
    )


def _guided_diffusion(network: Any) -> NetworkFacts:
    axes, channels, size = _axes(network), network.in_channels, getattr(network, "image_size", None)
    shape = {"CHW": square(channels, size), "CL": (channels, size) if isinstance(size, int) else None}.get(axes)
    classes = getattr(network, "num_classes", None) or 0
    known = {"axes": axes, "channels": channels}
    return NetworkFacts(shape, getattr(network, "out_channels", None), classes, "index", **known)


def _axes(network: nn.Module) -> str:
    """Of samples, by the convolutions; attention has one along a line in images too. The frames of a video are not told."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {kind for part in network.modules() for kind in kinds if isinstance(part, kind)}
    if nn.Conv3d in found:
        return "CFHW"
    return "CL" if found == {nn.Conv1d} else "CHW"


def _onnx(network: Any) -> NetworkFacts:
    widths = {name: known.shape[-1] if known.shape else 0 for name, known in network.conditions.items()}
    return NetworkFacts(
        network.sample_shape,
        network.out_channels,
        network.label_dim,
        network.label_kind or "rows",
        conditions=widths,
        prediction="denoised" if network.session.outputs[0] == "denoised" else None,
        returns_bottleneck=network.returns_bottleneck,
        whole_times=network.whole_times,
    )


def _diffusers_unet(network: Any) -> NetworkFacts:
    refuse(network, class_embed_type=None)
    classes = {"label_dim": network.config.num_class_embeds or 0, "labels": "index"}
    return _of_diffusers(network, **classes, betas="linear", reduction=_reduction(network))


def _diffusers_conditional(network: Any) -> NetworkFacts:
    config = network.config
    refuse(network, class_embed_type=None, num_class_embeds=None, time_cond_proj_dim=None)
    width = config.encoder_hid_dim or config.cross_attention_dim
    conditions = text(width)
    if config.addition_embed_type == "text_time":
        conditions |= {"text_embeds": None, "time_ids": None}
    else:
        refuse(network, addition_embed_type=None)
    if getattr(config, "encoder_hid_dim_type", None) not in (None, "text_proj"):
        conditions["image_embeds"] = None
    return _of_diffusers(network, conditions=conditions, betas="scaled_linear", reduction=_reduction(network))


def _reduction(network: Any) -> int:
    """Every block of a U-Net of diffusers but the last halves its input."""
    return 2 ** (len(network.config.block_out_channels) - 1)


def _diffusers_dit(network: Any) -> NetworkFacts:
    # The table of classes ends with a row for "none", which training drops labels to.
    count = network.config.num_embeds_ada_norm
    classes = {"label_dim": count, "labels": "index", "null_class": count}
    return _of_diffusers(network, **classes, prediction="epsilon", betas="linear")


def _diffusers_sd3(network: Any) -> NetworkFacts:
    return _of_diffusers(network, conditions=_joint_conditions(network.config), prediction="flow")


def _flux(network: Any) -> NetworkFacts:
    conditions = _joint_conditions(bare(network.transformer).config)
    return NetworkFacts(None, network.channels, conditions=conditions, prediction="flow")


def _joint_conditions(config: Any) -> dict[str, int | None]:
    """Those of a transformer that attends to text and image together."""
    return {
        "encoder_hidden_states": config.joint_attention_dim,
        "pooled_projections": config.pooled_projection_dim,
    }


def _of_diffusers(network: Any, **known: Any) -> NetworkFacts:
    config = network.config
    if "axes" not in known:
        known |= {"shape": square(config.in_channels, config.sample_size), "axes": "CHW"}
    channels = {"out_channels": config.out_channels or config.in_channels, "channels": config.in_channels}
    return NetworkFacts(diffusers=True, **channels, **known)


READERS: dict[str, Callable[[Any], NetworkFacts]] = {
    "EDMPrecond": _edm,
    "SongUNet": _raw_edm,
    "DhariwalUNet": _raw_edm,
    "OpenAIUNet": _openai,
    "OnnxModel": _onnx,
    "UNet2DModel": _diffusers_unet,
    "UNet2DConditionModel": _diffusers_conditional,
    "DiTTransformer2DModel": _diffusers_dit,
    "SD3Transformer2DModel": _diffusers_sd3,
    "Flux": _flux,
}
