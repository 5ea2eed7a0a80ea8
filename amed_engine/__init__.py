"""amed_engine: samples from a pretrained diffusion model in about five network evaluations.

    result = amed_engine.Sampler("digits").run(8)

Names are imported on first use, so that `import amed_engine` and the command line start without loading torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_NAMES = {
    "adapters": ("wrap",),
    "checkpoints": ("convert", "from_pretrained", "load_predictor", "save_predictor", "save_pretrained"),
    "datasets.generate": ("DatasetReport", "generate_dataset"),
    "engine.capture": ("StaleGraphError",),
    "engine.export.locations": ("get_cmake_dir", "get_include", "get_library", "get_pkgconfig_dir"),
    "engine.export.package": ("load_package",),
    "engine.export.read_plan": ("read_plan",),
    "engine.export.read_schedule": ("read_schedule",),
    "engine.export.stepper": ("Stepper",),
    "engine.export.write_plan": ("write_plan",),
    "engine.export.write_schedule": ("write_schedule",),
    "engine.measure": ("measure_mean",),
    "engine.result": ("SampleResult", "StepInfo"),
    "engine.sampler": ("Sampler",),
    "errors": (
        *("AmedError", "ConfigError", "DeadlineError", "EngineClosedError", "FileFormatError", "NonFiniteError"),
        *("QueueFullError", "UnsafeFileError"),
    ),
    "sampling.denoiser": ("Denoised",),
    "sampling.loop": ("sample",),
    "sampling.predictors": ("AMEDPredictor", "CoefficientPredictor", "ConstantPredictor"),
    "solvers": ("make_solver",),
    "solvers.mean": ("Mean",),
    "solvers.plan": ("Plan", "make_plan"),
    "solvers.schedule": ("make_schedule",),
    "solvers.stage": ("Midpoint",),
    "serving.engine": ("ContinuousSampler", "Cost"),
    "serving.order": ("Sample",),
    "serving.stats": ("ServingStats",),
    "training.calibrate": ("calibrate",),
    "training.distill": ("distill",),
    "training.fit": ("fit",),
    "training.search": ("search_schedule",),
    "zoo": ("load",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

if TYPE_CHECKING:
    from amed_engine.adapters import wrap as wrap
    from amed_engine.checkpoints import convert as convert
    from amed_engine.checkpoints import from_pretrained as from_pretrained
    from amed_engine.checkpoints import load_predictor as load_predictor
    from amed_engine.checkpoints import save_predictor as save_predictor
    from amed_engine.checkpoints import save_pretrained as save_pretrained
    from amed_engine.datasets.generate import DatasetReport as DatasetReport
    from amed_engine.datasets.generate import generate_dataset as generate_dataset
    from amed_engine.engine.capture import StaleGraphError as StaleGraphError
    from amed_engine.engine.export.locations import get_cmake_dir as get_cmake_dir
    from amed_engine.engine.export.locations import get_include as get_include
    from amed_engine.engine.export.locations import get_library as get_library
    from amed_engine.engine.export.locations import get_pkgconfig_dir as get_pkgconfig_dir
    from amed_engine.engine.export.package import load_package as load_package
    from amed_engine.engine.export.read_plan import read_plan as read_plan
    from amed_engine.engine.export.read_schedule import read_schedule as read_schedule
    from amed_engine.engine.export.stepper import Stepper as Stepper
    from amed_engine.engine.export.write_plan import write_plan as write_plan
    from amed_engine.engine.export.write_schedule import write_schedule as write_schedule
    from amed_engine.engine.measure import measure_mean as measure_mean
    from amed_engine.engine.result import SampleResult as SampleResult
    from amed_engine.engine.result import StepInfo as StepInfo
    from amed_engine.engine.sampler import Sampler as Sampler
    from amed_engine.errors import AmedError as AmedError
    from amed_engine.errors import ConfigError as ConfigError
    from amed_engine.errors import DeadlineError as DeadlineError
    from amed_engine.errors import EngineClosedError as EngineClosedError
    from amed_engine.errors import FileFormatError as FileFormatError
    from amed_engine.errors import NonFiniteError as NonFiniteError
    from amed_engine.errors import QueueFullError as QueueFullError
    from amed_engine.errors import UnsafeFileError as UnsafeFileError
    from amed_engine.sampling.denoiser import Denoised as Denoised
    from amed_engine.sampling.loop import sample as sample
    from amed_engine.sampling.predictors import AMEDPredictor as AMEDPredictor
    from amed_engine.sampling.predictors import CoefficientPredictor as CoefficientPredictor
    from amed_engine.sampling.predictors import ConstantPredictor as ConstantPredictor
    from amed_engine.serving.engine import ContinuousSampler as ContinuousSampler
    from amed_engine.serving.engine import Cost as Cost
    from amed_engine.serving.order import Sample as Sample
    from amed_engine.serving.stats import ServingStats as ServingStats
    from amed_engine.solvers import make_solver as make_solver
    from amed_engine.solvers.mean import Mean as Mean
    from amed_engine.solvers.plan import Plan as Plan
    from amed_engine.solvers.plan import make_plan as make_plan
    from amed_engine.solvers.schedule import make_schedule as make_schedule
    from amed_engine.solvers.stage import Midpoint as Midpoint
    from amed_engine.training.calibrate import calibrate as calibrate
    from amed_engine.training.distill import distill as distill
    from amed_engine.training.fit import fit as fit
    from amed_engine.training.search import search_schedule as search_schedule
    from amed_engine.zoo import load as load


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOME])


if not TYPE_CHECKING:  # checkers go by the imports, and take no list that is computed
    __all__ = __dir__()
