"""The predictors that an engine is given for requests that name nothing but perhaps the NFE: one for each NFE."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from amed_engine.engine.pairing import open_predictor
from amed_engine.engine.prepared import Wishes
from amed_engine.errors import ConfigError
from amed_engine.sampling.predictors import Predictor
from amed_engine.serving.programs import Programs


class Given(NamedTuple):
    """name: for errors, the file where it came from one."""

    name: str
    predictor: Predictor


def open_given(predictors: Any) -> dict[int, Given]:
    """By NFE, in the order given; files are read, objects copied. Raises ConfigError, FileFormatError."""
    if not isinstance(predictors, Sequence) or isinstance(predictors, (str, bytes)):
        raise ConfigError(
            f"predictors must be a list of files or predictors, one for each NFE, got {type(predictors).__name__}; pass "
            "[...] of them"
        )
    own: dict[int, Given] = {}
    for number, each in enumerate(predictors):
        name = str(each) if isinstance(each, (str, os.PathLike)) else f"predictors[{number}]"
        predictor = copy.deepcopy(open_predictor(each))  # which a caller may go on training
        if predictor.plan is None:
            raise ConfigError(
                f"{name} has no plan, which says for which NFE it is; name it in requests, with the NFE: predictor="
            )
        nfe = predictor.plan.nfe
        if nfe in own:
            raise ConfigError(f"{own[nfe].name} and {name} are both for NFE {nfe}; leave one of them out")
        own[nfe] = Given(name, predictor)
    return own


def check_given(own: Mapping[int, Given], programs: Programs, levels: Mapping[str, float | None]) -> None:
    """Against the model, as those that requests name. levels: sigma_min and sigma_max as the engine was told. Raises
    ConfigError."""
    told = [f"{name}={sigma}" for name, sigma in levels.items() if sigma is not None]
    if own and told:
        raise ConfigError(
            f"predictors bring their own noise levels, got {' and '.join(told)} as well; leave one or the other out"
        )
    for name, predictor in own.values():
        assert predictor.plan is not None
        try:
            programs.of(Wishes(predictor=predictor), predictor.plan.guidance_scale)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
