"""From what a request says to the call of an engine; all that can be refused before it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from amed_engine.engine.images import check_pictures
from amed_engine.engine.model import Model
from amed_engine.engine.result import SampleResult
from amed_engine.serving.engine import ContinuousSampler
from amed_engine.serving.http import programs, tensors
from amed_engine.serving.http.errors import Refusal
from amed_engine.serving.http.limits import Limits
from amed_engine.serving.http.schemas import Asked, Draw, Generation, refusal
from amed_engine.serving.http.service import Service
from amed_engine.serving.order import Sample


class Order(NamedTuple):
    """A call of `ContinuousSampler.submit`. model: the name it is served by."""

    model: str
    engine: ContinuousSampler
    batch: int | list[int] | torch.Tensor
    labels: Any
    options: dict[str, Any]

    @property
    def samples(self) -> int:
        return self.batch if isinstance(self.batch, int) else len(self.batch)

    def submit(self, on_sample: Callable[[Sample], None] | None = None) -> Future[SampleResult]:
        return self.engine.submit(self.batch, self.labels, on_sample=on_sample, **self.options)


def of_generation(asked: Generation, service: Service) -> Order:
    """Raises Refusal, ConfigError and EngineClosedError."""
    name, engine = _engine(asked, service)
    check_pictures(engine.model.shape)
    _check_size(asked.size, engine.model)
    return Order(name, engine, asked.batch, _labels(asked, engine.model), asked.options())


def of_draw(asked: Draw, service: Service) -> Order:
    """The same, and FileFormatError."""
    name, engine = _engine(asked, service)
    if asked.format in (None, "png"):
        check_pictures(engine.model.shape)
    elif asked.stream:
        raise refusal("format", f'samples are streamed as "png", got {asked.format!r}; leave format or stream out')
    own, latents = _own_program(asked, service), _latents(asked, engine, service.limits)
    batch = asked.batch if latents is None else latents
    order = Order(name, engine, batch, asked.class_labels, {**asked.options(), **own})
    if asked.conditions is not None:
        order.options["conditions"] = tensors.conditions(asked.conditions, engine, order.samples)
    if own:
        cost = engine.cost(order.batch, order.labels, **order.options)
        programs.check_evaluations(cost.evaluations // order.samples, service.limits)
    return order


def _engine(asked: Asked, service: Service) -> tuple[str, ContinuousSampler]:
    found, limits = service.engine(asked.model), service.limits
    _check_samples(asked.count, "n" if asked.seeds is None else "seeds", limits)
    programs.check_evaluations(asked.nfe or 0, limits)
    return found


def _check_samples(count: int, param: str, limits: Limits) -> None:
    if count > limits.samples:
        message = f"{count} samples were asked for, and a request may have {limits.samples}; send several"
        raise refusal(param, message)


def _latents(asked: Draw, engine: ContinuousSampler, limits: Limits) -> torch.Tensor | None:
    """Where they stand in the place of seeds."""
    if asked.latents is None:
        return None
    if asked.seeds is not None:
        raise refusal("seeds", "seeds and latents exclude each other; leave one of them out")
    given = tensors.latents(asked.latents, engine)
    _check_samples(len(given), "latents", limits)
    if asked.n not in (None, len(given)):
        raise refusal("n", f"n is {asked.n}, but latents are {len(given)}; leave n out")
    return given


def _own_program(asked: Draw, service: Service) -> dict[str, Any]:
    """What the request brings of its own: levels, a predictor, a recipe."""
    own: dict[str, Any] = {}
    if isinstance(asked.schedule, list):
        _check_allowed("schedule", service)
        own["schedule"] = _levels(asked.schedule, service)
    if asked.afs == "mean":  # which may be measured, by many evaluations
        _check_allowed("afs", service)
    if asked.program is not None:
        _check_allowed("program", service)
        if asked.predictor is not None and asked.program.predictor is not None:
            raise refusal("predictor", "predictor and program.predictor exclude each other; leave one of them out")
        own |= programs.options(asked.program, service.limits)
    return own


def _check_allowed(param: str, service: Service) -> None:
    if not service.allow_programs:
        message = (
            f"{param}: this server takes no solvers from requests; it would if it were started with --allow-programs"
        )
        raise Refusal(403, "programs_not_allowed", message, param)


def _levels(levels: list[Any], service: Service) -> torch.Tensor:
    if len(levels) < 2:
        raise refusal("schedule", f"schedule must be at least two noise levels, got {len(levels)}")
    programs.check_evaluations(
        len(levels) - 2, service.limits
    )  # before an update is built for each; the first may be free
    return torch.tensor(levels, dtype=torch.float64, device="cpu")


def _check_size(size: str | None, model: Model) -> None:
    own = None if model.shape is None else f"{model.shape[2]}x{model.shape[1]}"
    if size not in (None, "auto", own):
        raise refusal("size", f"this model draws {own}, got size {size[:40]!r}; leave it out")


def _labels(asked: Generation, model: Model) -> Any:
    """The classes that prompt or class_labels name; None where seeds draw them."""
    if asked.prompt == "":
        return asked.class_labels
    if asked.class_labels is not None:
        raise refusal("prompt", "prompt and class_labels both name classes; leave class_labels out, or prompt empty")
    if not model.classes:
        raise refusal("prompt", f"this model understands no prompt, got {asked.prompt[:40]!r}; send an empty one")
    if not re.fullmatch("[0-9]{1,9}", asked.prompt):
        what = f"the digits of a class, 0 to {model.classes - 1}, or empty"
        raise refusal("prompt", f"this model knows classes and no words: prompt is {what}, got {asked.prompt[:40]!r}")
    return int(asked.prompt)
