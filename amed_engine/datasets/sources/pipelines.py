"""Samples of a pipeline of diffusers: latents, or the pictures that it decodes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.datasets.sources import labels as rows
from amed_engine.datasets.sources.asking import Asked, ask, chosen_labels, defaults, parameters_of, seeded
from amed_engine.datasets.sources.base import Source, nothing_global, stored_kind, stored_shape
from amed_engine.datasets.sources.settings import Settings, configuration_of, lasting, settings_of, unusual
from amed_engine.engine import identity as identities
from amed_engine.engine.seeds import draw
from amed_engine.errors import ConfigError
from amed_engine.sampling.modes import evaluating, exactly, plain_defaults


def is_pipeline(source: Any) -> bool:
    """Whether it is one of diffusers, which then is imported already."""
    library = sys.modules.get("diffusers")
    return library is not None and isinstance(source, library.DiffusionPipeline)


@dataclass(frozen=True, eq=False)
class PipelineSource(Source):
    """What a pipeline draws with the options of its calls; prompts and classes are chosen by labels."""

    pipeline: Any
    asked: Asked

    @classmethod
    def open(cls, pipeline: Any, guidance_scale: Any, stored: Any, options: dict[str, Any]) -> PipelineSource:
        """Draws two samples twice, to see their shape and that each comes of its seed. Raises ConfigError where none does, and
        for options that the pipeline does not have."""
        asked = ask(pipeline, guidance_scale, options)
        if not asked.latent and getattr(pipeline, "safety_checker", None) is not None:
            raise ConfigError(
                "this pipeline's safety checker puts black pictures in the place of some, which would be samples of the data "
                "set: set pipeline.safety_checker = None and filter the data set, or store latents, output_type='latent'"
            )
        images, settings = _tried(pipeline, asked)
        shape = tuple(images.shape[1:])
        # Latents of three channels are no pictures.
        kind = stored_kind("float32" if asked.latent and stored is None else stored, shape)
        if asked.latent and kind == "uint8":
            raise ConfigError("stored='uint8' is for pictures, and output_type='latent' gives none; store 'float32'")
        told = identities.small(_identity(pipeline, asked, settings))
        return cls(stored_shape(kind, shape), kind, told, identities.device_name(_device(pipeline)), pipeline, asked)

    def _run(self, seeds: list[int], labels: np.ndarray | None) -> tuple[Tensor, np.ndarray | None]:
        if labels is None and self.asked.choices > self._alone:
            labels = rows.kept(draw(seeds, (), self.asked.choices)[1])
        return _drawn(self.pipeline, self.asked, seeds, labels), labels

    @property
    def _alone(self) -> int:
        """A single prompt is no choice, and has no label."""
        return 0 if self.asked.classes else 1

    def check_labels(self, labels: Any, count: int) -> np.ndarray | None:
        what = "classes" if self.asked.classes else "prompts"
        return None if labels is None else chosen_labels(rows.label_array(labels), self.asked.choices, count, what)


# ---- drawing ----


def _tried(pipeline: Any, asked: Asked) -> tuple[Tensor, dict[str, Settings]]:
    """Two samples, drawn in either order, and what either call leaves of settings. Raises ConfigError where a seed's sample
    depends on what is drawn with it."""
    calls = [
        (_drawn(pipeline, asked, seeds, np.zeros(2, np.int64)), settings_of(pipeline)) for seeds in ([0, 1], [1, 0])
    ]
    (one, before), (other, after) = calls
    apart, spread = (one - other.flip(0)).abs().mean(), (one[0] - one[1]).abs().mean()
    if bool(apart > 0.1 * spread):
        raise ConfigError(
            f"the samples of {_named(pipeline)} depend on what is drawn with them: two seeds in the other order give other "
            "samples, so it does not take its noise from a generator for each; use another scheduler"
        )
    return one, unusual(pipeline, lasting(before, after))


def _drawn(pipeline: Any, asked: Asked, seeds: list[int], labels: np.ndarray | None) -> Tensor:
    """(B, C, ...) float32: latents as they are, pictures in [-1, 1]."""
    told = asked.arguments(parameters_of(pipeline), len(seeds), labels)
    remedy = "use a scheduler that takes a generator, or one that adds no noise"
    with _as_alone(pipeline), nothing_global(_named(pipeline), remedy, _device(pipeline)):
        try:
            answer = pipeline(**told, generator=seeded(seeds))[0]
        except TypeError as error:
            if "enerator" in str(error):
                raise ConfigError(
                    f"{_named(pipeline)} takes no list of generators, one for each sample ({str(error).splitlines()[0]}): use "
                    "another scheduler"
                ) from error
            if "BFloat16" in str(error):
                raise ConfigError(
                    f"{type(pipeline).__name__} decodes no pictures in bfloat16: pass pipeline.to(torch.float32)"
                ) from error
            raise
    return _latents(pipeline, answer, len(seeds)) if asked.latent else _pictures(pipeline, answer, len(seeds))


def _latents(pipeline: Any, answer: Any, count: int) -> Tensor:
    if not isinstance(answer, Tensor) or len(answer) != count or answer.dim() < 2:
        raise ConfigError(f"{type(pipeline).__name__} gives no latents: it has no output_type='latent'; leave that out")
    return answer.detach().float()


def _pictures(pipeline: Any, answer: Any, count: int) -> Tensor:
    """Pictures (B, H, W, C), or of a video (B, F, H, W, C), in [0, 1] as channels first in [-1, 1]."""
    if not isinstance(answer, np.ndarray) or answer.ndim not in (4, 5) or len(answer) != count:
        got = f"an array of shape {answer.shape}" if isinstance(answer, np.ndarray) else type(answer).__name__
        raise ConfigError(
            f"{type(pipeline).__name__} does not answer with an array of pictures, but with {got}; store its latents, "
            "output_type='latent'"
        )
    return 2 * torch.from_numpy(np.ascontiguousarray(np.moveaxis(answer, -1, -3))).float() - 1


@contextmanager
def _as_alone(pipeline: Any) -> Iterator[None]:
    """The pipeline without its progress bar, its parts in evaluation mode, and the caller's modes of torch kept out."""
    bar = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**bar, "disable": True})
    usual = torch.get_default_dtype() == torch.float32 and torch.get_default_device().type == "cpu"
    try:
        with ExitStack() as modes:
            for module in _modules(pipeline).values():
                modes.enter_context(evaluating(module))
            modes.enter_context(exactly(_device(pipeline)))
            if not usual:
                modes.enter_context(plain_defaults())
            yield
    finally:
        pipeline.set_progress_bar_config(**bar)


# ---- what it is ----


def _named(pipeline: Any) -> str:
    return f"{type(pipeline).__name__} with {type(getattr(pipeline, 'scheduler', None)).__name__}"


def _device(pipeline: Any) -> torch.device:
    """Where it computes, offloaded parts too."""
    return torch.empty(0, device=getattr(pipeline, "_execution_device", pipeline.device)).device


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _identity(pipeline: Any, asked: Asked, settings: dict[str, Settings]) -> dict[str, Any]:
    own = getattr(getattr(pipeline.components.get("predictor"), "predictor", None), "plan", None)
    told, usual = asked.told(), defaults(parameters_of(pipeline))
    components = {name: _component(part) for name, part in sorted(pipeline.components.items()) if part is not None}
    prints = [part["fingerprint"] for part in components.values() if "fingerprint" in part]
    return {
        "kind": "diffusers",
        "model": type(pipeline).__name__,
        "fingerprint": None if None in prints else identities.hashed(prints),
        "components": components,
        "configuration": identities.plain(configuration_of(pipeline)),
        "settings": settings,
        "plan": None if own is None else own.to_json(),
        "guidance_scale": told.get("guidance_scale", usual.get("guidance_scale")),
        "options": {**usual, **told},
        **identities.arithmetic(_device(pipeline)),
    }


def _component(part: Any) -> dict[str, Any]:
    """Of a module its weights, of a tokenizer its words, and the configuration of both and of a scheduler."""
    told: dict[str, Any] = {"class": type(part).__name__}
    if isinstance(part, nn.Module):
        told |= {"fingerprint": fingerprint(part), "buffers": identities.buffers_hash(part)}
    if callable(words := getattr(part, "get_vocab", None)):
        told["words"] = identities.hashed(words())
    if configuration := configuration_of(part):
        told["configuration"] = identities.plain(configuration)
    return told
