"""In which dtypes a network is handed its state, and its time and labels: what its own layers take decides."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import is_tracing
from amed_engine.sampling.modules import dtypes_of, module_of

A = TypeVar("A")
# How torch says that a layer and its input are of different dtypes, among them its names of half precision.
_COMPUTE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MISMATCH = re.compile(r"dtype|data type|scalar type|same type|should be the same|Half|BFloat16|Float8")


class Handed(NamedTuple):
    """state: of x and of conditions. rest: of the time and of labels as rows."""

    state: torch.dtype
    rest: torch.dtype


class Precision:
    """The dtypes of one network, found by its first call and kept.

    A network of one dtype gets its state in it, its time and labels as they are: times up to 1000 are no numbers of bfloat16.
    Where a layer refuses them, they come in the network's dtype as well. One of several dtypes gets its state in the widest
    that its layers take, one whose parameters tell none in x's, else in the widest. Whole numbers and 8-bit floats are
    storage, and tell nothing.
    """

    def __init__(self, network: Any):
        self._states = dtypes_of(network)
        self._found: dict[Any, Handed] = {}

    def call(self, network: Any, wide: torch.dtype, ask: Callable[[Handed], A], first: Handed | None = None) -> A:
        """ask's answer for the dtypes that this network takes; wide: that of the sampler's state. first: what comes before its
        own dtypes, and is all where its parameters tell none. Raises what ask raises."""
        parameter = None if (module := module_of(network)) is None else next(module.parameters(), None)
        key = (wide, None if parameter is None else parameter.dtype)  # a network converted since is asked anew
        known = self._found.get(key)
        if torch.compiler.is_compiling() or is_tracing():
            return ask(known or first or self._untried(*key))
        if known is not None:
            try:
                return ask(known)
            except RuntimeError as error:
                if not _MISMATCH.search(str(error)):
                    raise
        return self._tried(network, key, ask, first)

    def _tried(self, network: Any, key: Any, ask: Callable[[Handed], A], first: Handed | None) -> A:
        """The first of the candidates that the layers take; where none is, the error of the first."""
        self._states = dtypes_of(network)
        refused: list[RuntimeError] = []
        for handed in self._candidates(key[0], first):
            try:
                answer = ask(handed)
            except RuntimeError as error:
                if not _MISMATCH.search(str(error)):
                    raise
                refused.append(error)
            else:
                self._found[key] = handed
                return answer
        raise refused[0]

    def _candidates(self, wide: torch.dtype, first: Handed | None) -> list[Handed]:
        told = sorted(self._states, key=lambda dtype: -torch.finfo(dtype).bits)
        states = told or ([] if first else [wide, *reversed(_COMPUTE)])
        others = (Handed(state, rest) for state in states for rest in (wide, state))
        return list(dict.fromkeys([first, *others] if first else others))

    def _untried(self, wide: torch.dtype, first: torch.dtype | None) -> Handed:
        """For a look of torch.compile, jit.trace or export, which can try nothing."""
        if len(self._states) > 1:
            raise ConfigError(
                f"the network holds {', '.join(map(str, self._states))}, and which of them its input has to be is found by its "
                "first call: call the denoiser once before it is compiled, traced or exported"
            )
        state = first if first in _COMPUTE else next(iter(self._states), wide)
        return Handed(state, wide)  # type: ignore[arg-type]
