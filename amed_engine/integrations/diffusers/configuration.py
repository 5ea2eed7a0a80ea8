"""What a scheduler's configuration says: the solver, the first step, and the setting of a predictor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from amed_engine.adapters.schedulers import OWN_SETTINGS, SPACING
from amed_engine.errors import ConfigError
from amed_engine.integrations.common import constants, one_mean, open_predictor
from amed_engine.integrations.diffusers.limits import Limits
from amed_engine.integrations.diffusers.parameterization import OPTIONAL
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.sampling.predictors.constant import ConstantPredictor
from amed_engine.solvers import make_solver
from amed_engine.solvers.base import Solver
from amed_engine.solvers.mean import Mean, check_first_step
from amed_engine.solvers.plan_json import as_first_meant

logger = logging.getLogger("amed_engine")


def of_predictor(predictor: Any) -> dict[str, Any]:
    """The configuration of the setting that a predictor, or the one in a file, was trained for. Raises ConfigError."""
    predictor = open_predictor(predictor)
    single = isinstance(predictor, ConstantPredictor) and predictor.points == 1
    if not single and not isinstance(predictor, AMEDPredictor):
        raise ConfigError(
            "from_predictor takes an AMEDPredictor, or a ConstantPredictor of one point, got "
            f"{type(predictor).__name__}; others are for amed_engine.Sampler"
        )
    if predictor.plan is None:
        raise ConfigError("from_predictor needs a predictor that was saved with its plan; pass midpoints otherwise")
    plan, mean = predictor.plan, one_mean(predictor.plan)
    return {
        "noise_levels": list(plan.sigmas),
        "midpoints": [list(midpoint) for midpoint in constants(predictor, plan.levels)],
        "solver": plan.solver,
        "solver_options": dict(plan.options),
        "afs": plan.afs,
        "mean": None if mean is None else mean.to_json(),
        "final_sigmas_type": "zero" if plan.denoise_to_zero else "sigma_min",
        "guidance_scale": plan.guidance_scale,
    }


def solver_of(config: Mapping[str, Any]) -> Solver:
    """The solver, one that a scheduler can run. Raises ConfigError."""
    made = make_solver(config["solver"], **(config["solver_options"] or {}))
    if made.takes_predictor == "none" or made.evaluations(True) != 2:
        raise ConfigError(f"AMEDScheduler needs a solver of two evaluations per interval, not {config['solver']!r}")
    limited = Limits.of(config).any
    if limited and made.thresholds:
        raise ConfigError(f"{config['solver']} with thresholding has its own; leave out thresholding and clip_sample")
    if config["afs"] and (made.thresholds or limited):
        raise ConfigError("afs cannot be folded into the first latents of a solver with thresholding; set afs=False")
    if config["afs"] and config["prediction_type"] == "flow_prediction":
        raise ConfigError("pipelines of flow-matching models do not scale their first latents; set afs=False")
    return made


def told_alone(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the optional settings that nobody said; those of the steps that are said in its own entry."""
    unsaid = OPTIONAL & set(config.get("_use_default_values", ()))
    kept = {name: value for name, value in config.items() if name not in unsaid}
    told = {name: kept[name] for name in sorted(SPACING) if name in kept}
    if told:
        kept[OWN_SETTINGS] = {**kept.get(OWN_SETTINGS, {}), **told}
    defaults = sorted(set(kept.pop("_use_default_values", ())) - unsaid)
    return kept | ({"_use_default_values": defaults} if defaults else {})


def in_full(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say every option of the solver, so that a file means the same wherever it is read."""
    options = {"solver_options": solver_of(config).options}
    if "_use_default_values" not in config:
        return options
    return options | {"_use_default_values": sorted({*config["_use_default_values"]} - {"solver_options"})}


def as_many_as_betas(config: Mapping[str, Any]) -> dict[str, int]:
    """The entry that says how many training steps there are, where trained_betas say another number; a warning where both
    were said.
    """
    betas, steps = config["trained_betas"], config["num_train_timesteps"]
    if betas is None or len(betas) == steps:
        return {}
    if "num_train_timesteps" not in config.get("_use_default_values", ()):
        logger.warning(
            "num_train_timesteps=%d with trained_betas of %d steps: the betas count, the network is told 0 to %d",
            *(steps, len(betas), len(betas) - 1),
        )
    return {"num_train_timesteps": len(betas)}


def as_saved(config: Any) -> Any:
    """A configuration with its solver's options as the version that wrote it meant them: those of now say every option."""
    if not isinstance(config, Mapping) or not isinstance(config.get("solver"), str):
        return config
    return {**config, "solver_options": as_first_meant(config["solver"], config.get("solver_options") or {})}


def mean_of_config(afs: Any, mean: Any) -> Mean | None:
    """The mean answer in a scheduler's configuration, as `Mean.to_json` writes it. Raises ConfigError."""
    check_first_step(afs)
    if (afs == "mean") is (mean is None):
        raise ConfigError(
            f"afs={afs!r} with mean={'None' if mean is None else '...'}: a mean answer goes with afs='mean' and with no other; "
            "pass mean=amed_engine.measure_mean(model).to_json() with that, else mean=None"
        )
    if mean is None:
        return None
    read = Mean.from_json(mean)
    if len(read.rows()) > 1:
        raise ConfigError(
            f"a scheduler cannot see which of {read.classes} classes an image is of, and this mean answer differs by class; "
            "use AMEDPipeline or Sampler, or AMEDScheduler.from_predictor where it is one for any class"
        )
    return read
