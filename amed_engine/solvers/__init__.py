"""The table of solvers by name. Names are known without torch; a class is imported when it is looked up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from amed_engine.errors import ConfigError
from amed_engine.solvers.arguments import told

if TYPE_CHECKING:
    from amed_engine.solvers.base import Solver, UseOfPredictor

# Name -> file and class, and whether it takes midpoints from a predictor, as the class says too.
_TABLE: dict[str, tuple[str, str, UseOfPredictor]] = {
    "euler": ("multistep", "Euler", "optional"),
    "heun": ("singlestep", "Heun", "none"),
    "dpm": ("singlestep", "DPM2", "optional"),
    "ipndm": ("multistep", "IPNDM", "optional"),
    "deis": ("multistep", "DEIS", "optional"),
    "dpmpp": ("multistep", "DPMpp", "optional"),
    "unipc": ("multistep", "UniPC", "optional"),
    "amed": ("singlestep", "AMED", "required"),
    "nonstationary": ("multistep", "Nonstationary", "required"),
    "consistency": ("consistency", "Consistency", "none"),
}
_NO_INTEGRATORS = {"consistency"}  # `Solver.integrates` is False
_HOMES = {"Solver": "base", **{kind: file for file, kind, _ in _TABLE.values()}}


def __getattr__(kind: str) -> type[Solver]:
    """`from amed_engine.solvers import AMED`: a class, whose file is imported now."""
    if kind not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {kind!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[kind]}"), kind)


class _Solvers(Mapping):
    """Name -> class."""

    def __getitem__(self, name: str) -> type[Solver]:
        return __getattr__(_TABLE[name][1])

    def __iter__(self) -> Iterator[str]:
        return iter(_TABLE)

    def __len__(self) -> int:
        return len(_TABLE)


SOLVERS: Mapping[str, type[Solver]] = _Solvers()


def solver_names(*uses: UseOfPredictor) -> list[str]:
    """The solvers whose use of a predictor is one of these: none, optional, required."""
    return [name for name, (_, _, use) in _TABLE.items() if use in uses]


def integrator_names(*uses: UseOfPredictor) -> list[str]:
    """Those of them that integrate the ODE of a denoiser."""
    return [name for name in solver_names(*uses) if name not in _NO_INTEGRATORS]


def alternatives(names: Sequence[str]) -> str:
    """The names as text: a, b or c."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


USE_WITH_PREDICTOR = f"use amed, or a plugin on {', '.join(solver_names('optional'))}"  # what errors advise


def make_solver(name: str, **options: Any) -> Solver:
    """The solver of that name with its options, those left out at their published defaults. Raises ConfigError.

    euler | heun | dpm(r) | ipndm(max_order) | deis(max_order, deis_mode) | dpmpp(max_order, predict_x0,
    lower_order_final, thresholding) | unipc(the same, variant) | amed(points) | nonstationary | consistency.
    """
    return with_options(name, options)


def with_options(name: Any, options: Mapping[Any, Any]) -> Solver:
    """`make_solver` of what a file or a caller said, whatever its options are called. Raises ConfigError."""
    if not isinstance(name, str) or name not in SOLVERS:
        raise ConfigError(f"unknown solver {told(name)}; valid names: {', '.join(SOLVERS)}")
    solver = SOLVERS[name]
    valid = list(solver.defaults())
    unknown = sorted(str(option) for option in set(options) - set(valid))
    if unknown:
        raise ConfigError(
            f"solver {name!r} has no option {', '.join(unknown)[:200]}; valid options: {', '.join(valid) or 'none'}"
        )
    return solver(**options)
