"""What the arguments of the networks may be: their types and ranges by name, checked before anything of their size is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from amed_engine.errors import ConfigError
from amed_engine.solvers.arguments import (
    in_range,
    is_bool,
    is_fraction,
    is_list,
    is_number,
    is_positive,
    is_whole,
    one_of,
    told,
)

MAX_SIDE = 1 << 16  # of an image
MAX_LEVELS = 17  # each half as wide as the one before, the last one pixel
Check = Callable[[str, str, Any], Any]


def check_arguments(owner: str, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first that is of another type or out of its range."""
    for name, value in arguments.items():
        if name in CHECKS:
            CHECKS[name](owner, name, value)


def check_levels(owner: str, name: str, side: int, levels: int) -> None:
    """Raise ConfigError where images are too small to be halved so often."""
    if side >> (levels - 1) < 1:
        raise ConfigError(
            f"{owner}: {name}={side} is too small for the {levels} levels of channel_mult; leave some out"
        )


def check_sigmas(owner: str, sigma_min: Any, sigma_max: Any) -> None:
    """Raise ConfigError unless 0 <= sigma_min < sigma_max, which may be infinite."""
    low = is_number(owner, "sigma_min", sigma_min, "a number of at least 0")
    high = is_number(owner, "sigma_max", sigma_max, "a number, or infinite")
    if not 0 <= low < high:
        raise ConfigError(
            f"{owner}: sigma_min must be at least 0 and below sigma_max, got {told(sigma_min)} and {told(sigma_max)}"
        )


def _multipliers(owner: str, name: str, value: Any) -> None:
    for each in is_list(owner, name, value, 1, MAX_LEVELS, "multipliers of model_channels, one for each level"):
        is_positive(owner, name, each)


def _resolutions(owner: str, name: str, value: Any) -> None:
    for each in is_list(owner, name, value, 0, 64, "integers"):
        in_range(owner, name, each, 1, MAX_SIDE)


def _taps(owner: str, name: str, value: Any) -> None:
    taps = [is_number(owner, name, each) for each in is_list(owner, name, value, 1, 64, "numbers")]
    if not math.isfinite(total := sum(taps)) or abs(total) < 1e-12 * max(map(abs, taps)) or not total:
        raise ConfigError(f"{owner}: {name} must be finite numbers whose sum is not zero, got {told(value)}")


def _heads(owner: str, name: str, value: Any) -> None:
    if not is_whole(value, -1, -1):
        in_range(owner, name, value, 1)


def _classes(owner: str, name: str, value: Any) -> None:
    if value is not None:
        in_range(owner, name, value, 1)


_positive, _count = partial(in_range, low=1), partial(in_range, low=0)
CHECKS: dict[str, Check] = {
    **dict.fromkeys(("img_resolution", "image_size"), partial(in_range, low=1, high=MAX_SIDE)),
    **dict.fromkeys(("img_channels", "in_channels", "out_channels", "model_channels"), _positive),
    **dict.fromkeys(("channel_mult_emb", "channel_mult_noise", "num_blocks", "num_res_blocks", "num_heads"), _positive),
    **dict.fromkeys(("label_dim", "augment_dim"), _count),
    **dict.fromkeys(("num_head_channels", "num_heads_upsample"), _heads),
    **dict.fromkeys(("attn_resolutions", "attention_resolutions"), _resolutions),
    **dict.fromkeys(("use_fp16", "conv_resample", "use_checkpoint", "use_scale_shift_norm"), is_bool),
    **dict.fromkeys(("resblock_updown", "use_new_attention_order"), is_bool),
    "num_classes": _classes,
    "channel_mult": _multipliers,
    "resample_filter": _taps,
    "dropout": is_fraction,
    "label_dropout": partial(is_fraction, closed=True),
    "sigma_data": is_positive,
    "embedding_type": partial(one_of, valid=("positional", "fourier")),
    "encoder_type": partial(one_of, valid=("standard", "skip", "residual")),
    "decoder_type": partial(one_of, valid=("standard", "skip")),
}
