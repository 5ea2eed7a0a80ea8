"""From what a request asks for to a program and its table, once for each value of it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from amed_engine.engine.model import Model
from amed_engine.engine.pairing import open_plan, open_predictor
from amed_engine.engine.prepared import Prepared, Wishes, prepare
from amed_engine.engine.request import shape_of
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import check_features
from amed_engine.sampling.modes import evaluating, plain_tensors
from amed_engine.sampling.modules import said
from amed_engine.sampling.predictors import AMEDPredictor, Predictor
from amed_engine.serving.conditions import takes_conditions
from amed_engine.serving.table import NoTable, Table, tabulated
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program

KEPT = 256  # programs, of which those that were asked for last stay


@dataclass(frozen=True, eq=False)
class Programmed:
    """A program on the device, its plan, and its table; None where it is none, and why."""

    program: Program
    plan: Plan
    table: Table | None
    why_not: str = ""

    @property
    def ticks(self) -> int:
        """Evaluations of each sample, one after another."""
        return self.plan.nfe if self.table is None else self.table.ticks


class Programs:
    """The programs of one model, cached by the value of what was asked for. Threads may share it."""

    def __init__(
        self,
        model: Model,
        tuned: Model,
        *,
        history: int,
        verify: bool,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.model, self.tuned, self.history = model, tuned, history
        self._prepare: dict[str, Any] = {"verify": verify, "device": device, "dtype": dtype}
        self._prepared: OrderedDict[Hashable, Prepared] = OrderedDict()
        self._tables: OrderedDict[int, Programmed] = OrderedDict()
        self._bottleneck: tuple[int, int] | None = None  # of the predictors in tables: a model has one
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.RLock()

    def of(self, wishes: Wishes, guidance_scale: float | None) -> Programmed:
        """Raises ConfigError, FileFormatError for what cannot run on this model."""
        wishes, key = _opened(wishes)
        prepared = self._once(key, wishes)
        with self._lock:
            return self._tabulated(*prepared.under(guidance_scale))

    @plain_tensors()
    def make_own(self, given: Mapping[str, Any]) -> AMEDPredictor | None:
        """Make the programs that requests get which say nothing but perhaps the NFE, where the model has predictors of its own,
        and those that step in for them under guidance. given: of every wish, by the engine.

        Returns one of the predictors that rows will have, None where there are none. What cannot run is left out here, and
        refused to who asks for it.
        """
        found = None
        for nfe in (None, *self.model.predictors) if self.model.predictors else ():
            wishes, key = _opened(Wishes(nfe=nfe, **given))
            with suppress(ConfigError):
                prepared = self._once(key, wishes)
                for program, plan in filter(None, (prepared.fallback, (prepared.program, prepared.plan))):
                    with self._lock:
                        table = self._tabulated(program, plan).table
                    found = found or (table and table.predictor)
        return found

    def _once(self, key: Hashable, wishes: Wishes) -> Prepared:
        """Whoever asks for the same waits for it, and nobody else: a mean that is measured takes many evaluations."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        try:
            with making:
                with self._lock:
                    prepared = self._prepared.get(key)
                if prepared is None:
                    prepared = prepare(self.model, self.tuned, wishes, **self._prepare)
                with self._lock:
                    _keep(self._prepared, key, prepared)
                return prepared
        finally:
            with self._lock:
                self._making.pop(key, None)

    def _tabulated(self, program: Program, plan: Plan) -> Programmed:
        if id(program) not in self._tables:  # which the value keeps alive
            _keep(self._tables, id(program), self._written(program, plan))
        self._tables.move_to_end(id(program))
        return self._tables[id(program)]

    def _written(self, program: Program, plan: Plan) -> Programmed:
        try:
            table = tabulated(plan.program(program.predictor), self.history)
            self._check_bottleneck(table.predictor)
        except NoTable as error:
            return Programmed(program, plan, None, str(error))
        return Programmed(program, plan, table)

    def _check_bottleneck(self, predictor: AMEDPredictor | None) -> None:
        if predictor is None:
            return
        if self._bottleneck is None:
            if said(self.model.network, "bottleneck_size") is None:  # else it was compared when they were paired
                self._look(predictor)
            self._bottleneck = predictor.bottleneck
        if predictor.bottleneck != self._bottleneck:
            raise NoTable(f"predictors of other bottlenecks than {self._bottleneck} have no room here")

    @torch.no_grad()
    def _look(self, predictor: AMEDPredictor) -> None:
        """At what the network answers, before a predictor that cannot read it fails a tick of others. Raises ConfigError."""
        if (adapter := takes_conditions(self.model)) is not None and not adapter.conditions.count:
            return  # it cannot be asked before a request brings some
        model, count = self.tuned, said(self.model.network, "batch_range", (1, 1))[0]
        kind: dict[str, Any] = {"device": self._prepare["device"], "dtype": self._prepare["dtype"]}
        labels = [torch.zeros(count, model.label_dim, **kind)] if model.label_dim else []
        with evaluating(model.module):
            inputs = torch.zeros(count, *shape_of(model), **kind), torch.ones(count, **kind)
            features = model.denoise(*inputs, *labels).features
        if features is not None:
            check_features(features, predictor.bottleneck)


def _keep(cache: OrderedDict, key: Hashable, value: Any) -> None:
    """The newest, in place of the one that was asked for longest ago."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > KEPT:
        cache.popitem(last=False)


def _opened(wishes: Wishes) -> tuple[Wishes, Hashable]:
    """The wishes with files read, and a key that says their value. Raises ConfigError, FileFormatError."""
    predictor, plan = wishes.predictor, open_plan(wishes.plan)
    if predictor is not None and not isinstance(predictor, Predictor) and predictor != "none":
        predictor = open_predictor(predictor)
    said = {name: _hashable(getattr(wishes, name)) for name in wishes.__dataclass_fields__}
    said |= {"predictor": _value(predictor) if isinstance(predictor, Predictor) else predictor, "plan": plan}
    opened = Wishes(**{**{name: getattr(wishes, name) for name in said}, "predictor": predictor, "plan": plan})
    return opened, tuple(said.items())


def _hashable(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return ("levels", str(value.dtype), tuple(value.detach().flatten().tolist()), tuple(value.shape))
    if isinstance(value, Mapping):
        return tuple(sorted((repr(name), repr(each)) for name, each in value.items()))
    try:
        hash(value)
    except TypeError:  # what is refused later, a list among them
        return repr(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else (type(value), value)


def _value(predictor: Predictor) -> str:
    """A hash of everything that a predictor says."""
    digest = hashlib.sha256(f"{type(predictor).__name__}{json.dumps(predictor.config, sort_keys=True)}".encode())
    digest.update(repr(None if predictor.plan is None else astuple(predictor.plan)).encode())
    for name, tensor in sorted(predictor.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
