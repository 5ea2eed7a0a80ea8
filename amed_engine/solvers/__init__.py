"""The table of solvers by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from amed_engine.errors import ConfigError
from amed_engine.solvers.base import Solver
from amed_engine.solvers.multistep import DEIS, IPNDM, DPMpp, Euler, Nonstationary, UniPC
from amed_engine.solvers.singlestep import AMED, DPM2, Heun

SOLVERS: dict[str, type[Solver]] = {
    "euler": Euler,
    "heun": Heun,
    "dpm": DPM2,
    "ipndm": IPNDM,
    "deis": DEIS,
    "dpmpp": DPMpp,
    "unipc": UniPC,
    "amed": AMED,
    "nonstationary": Nonstationary,
}


def make_solver(name: str, **options: Any) -> Solver:
    """The solver of that name with its options, those left out at their published defaults. Raises ConfigError.

    euler | heun | dpm(r) | ipndm(max_order) | deis(max_order, deis_mode) | dpmpp(max_order, predict_x0,
    lower_order_final, thresholding) | unipc(the same, variant) | amed(points) | nonstationary.
    """
    if name not in SOLVERS:
        raise ConfigError(f"unknown solver {name!r}; valid names: {', '.join(SOLVERS)}")
    solver = SOLVERS[name]
    valid = [field.name for field in fields(solver)]  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise ConfigError(
            f"solver {name!r} has no option {', '.join(unknown)}; valid options: {', '.join(valid) or 'none'}"
        )
    return solver(**options)
