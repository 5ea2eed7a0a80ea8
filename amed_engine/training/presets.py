"""What a training run is: the paper's settings by name, what a caller puts in their place, and what the model says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.adapters.recorded import wrapping_of
from amed_engine.engine.model import Model, check_integrable
from amed_engine.errors import ConfigError
from amed_engine.solvers.plan import Plan, own_range


@dataclass(frozen=True)
class Settings:
    """Student, teacher and length of a training run."""

    solver: str = "amed"
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = "time_uniform"
    rho: float | None = None
    scale_dir: float = 0.01
    scale_time: float = 0.0
    teacher: str = "heun"
    teacher_options: Mapping[str, Any] = field(default_factory=dict)
    teacher_intermediate: int = 1
    total_kimg: float = 10
    batch: int = 128
    lr: float = 1e-2


# The two of Zhou et al. 2024 (arXiv:2312.00094) for unconditional networks in pixel space. The learning rate is ours: they
# had 5e-3 throughout, we start higher and come to rest.
PRESETS = {
    "amed-solver": Settings(),
    "amed-plugin": Settings(
        solver="ipndm",
        solver_options={"max_order": 4},
        schedule="polynomial",
        rho=7.0,
        scale_time=0.2,
        teacher="ipndm",
        teacher_options={"max_order": 4},
        teacher_intermediate=2,
    ),
}
# An option of the preset that belongs to another one, and means nothing once that is replaced.
_BELONGS_TO = {"solver_options": "solver", "teacher_options": "teacher", "rho": "schedule"}


def choose(preset: str, given: Mapping[str, Any]) -> Settings:
    """The preset with what is given (not None) in its place. Raises ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; valid names: {', '.join(PRESETS)}")
    own, default = asdict(PRESETS[preset]), asdict(Settings())
    given = {name: value for name, value in given.items() if value is not None}
    orphans = {n: default[n] for n, owner in _BELONGS_TO.items() if given.get(owner, own[owner]) != own[owner]}
    settings = Settings(**{**own, **orphans, **given})
    kimg, batch, lr = settings.total_kimg, settings.batch, settings.lr
    if not isinstance(batch, int) or batch < 1 or not 0 < kimg < math.inf or not lr > 0:
        raise ConfigError(f"batch, total_kimg and lr must be positive, batch whole, got {batch}, {kimg}, {lr}")
    return settings


# Of one evaluation per step the one that comes nearest to the exact solution; 24 leave an error of about 0.01 on digits.
TEACHER: dict[str, Any] = {"solver": "deis", "options": {"max_order": 4}, "schedule": "polynomial", "rho": 7.0}


def noise_range(model: Model) -> dict[str, Any]:
    """sigma_min and sigma_max of plans for this model, of whose ODE something is to be learned. Raises ConfigError."""
    check_integrable(model)
    low, high = own_range(model.sigma_min, model.sigma_max)
    return {"sigma_min": low, "sigma_max": high}


def made_for(model: Model, plan: Plan) -> Plan:
    """The plan of a predictor that was trained for this model and no other."""
    model_is, wrapping = fingerprint(model.network), wrapping_of(model.network)
    told = None if model_is is None or wrapping is None else json.dumps(wrapping, sort_keys=True)
    return replace(plan, model=model_is, dtype=model.precision, wrapping=told)
