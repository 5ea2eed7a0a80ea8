"""amed_engine: samples from a pretrained diffusion model in about five network evaluations.

    result = amed_engine.Sampler("digits").run(8)

Names are imported on first use, so that `import amed_engine` and the command line start without loading torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "AMEDPredictor": "sampling.predictors.amed",
    "AmedError": "errors",
    "CoefficientPredictor": "sampling.predictors.coefficient",
    "ConfigError": "errors",
    "ConstantPredictor": "sampling.predictors.constant",
    "Denoised": "sampling.denoiser",
    "FileFormatError": "errors",
    "Midpoint": "solvers.stage",
    "NonFiniteError": "errors",
    "Plan": "solvers.plan",
    "SampleResult": "engine.result",
    "Sampler": "engine.sampler",
    "StaleGraphError": "engine.capture",
    "StepInfo": "engine.result",
    "Stepper": "engine.export.stepper",
    "UnsafeFileError": "errors",
    "convert": "checkpoints",
    "distill": "training.distill",
    "fit": "training.fit",
    "from_pretrained": "checkpoints",
    "get_cmake_dir": "engine.export.locations",
    "get_include": "engine.export.locations",
    "get_library": "engine.export.locations",
    "get_pkgconfig_dir": "engine.export.locations",
    "load": "zoo",
    "load_package": "engine.export.package",
    "load_predictor": "checkpoints",
    "make_plan": "solvers.plan",
    "make_schedule": "solvers.schedule",
    "make_solver": "solvers",
    "read_plan": "engine.export.read_plan",
    "read_schedule": "engine.export.schedule_table",
    "sample": "sampling.loop",
    "save_predictor": "checkpoints",
    "save_pretrained": "checkpoints",
    "search_schedule": "training.search",
    "wrap": "adapters",
    "write_plan": "engine.export.write_plan",
    "write_schedule": "engine.export.schedule_table",
}

__all__ = [
    "AMEDPredictor",
    "AmedError",
    "CoefficientPredictor",
    "ConfigError",
    "ConstantPredictor",
    "Denoised",
    "FileFormatError",
    "Midpoint",
    "NonFiniteError",
    "Plan",
    "SampleResult",
    "Sampler",
    "StaleGraphError",
    "StepInfo",
    "Stepper",
    "UnsafeFileError",
    "__version__",
    "convert",
    "distill",
    "fit",
    "from_pretrained",
    "get_cmake_dir",
    "get_include",
    "get_library",
    "get_pkgconfig_dir",
    "load",
    "load_package",
    "load_predictor",
    "make_plan",
    "make_schedule",
    "make_solver",
    "read_plan",
    "read_schedule",
    "sample",
    "save_predictor",
    "save_pretrained",
    "search_schedule",
    "wrap",
    "write_plan",
    "write_schedule",
]

if TYPE_CHECKING:
    from amed_engine.adapters import wrap
    from amed_engine.checkpoints import convert, from_pretrained, load_predictor, save_predictor, save_pretrained
    from amed_engine.engine.capture import StaleGraphError
    from amed_engine.engine.export.locations import get_cmake_dir, get_include, get_library, get_pkgconfig_dir
    from amed_engine.engine.export.package import load_package
    from amed_engine.engine.export.read_plan import read_plan
    from amed_engine.engine.export.schedule_table import read_schedule, write_schedule
    from amed_engine.engine.export.stepper import Stepper
    from amed_engine.engine.export.write_plan import write_plan
    from amed_engine.engine.result import SampleResult, StepInfo
    from amed_engine.engine.sampler import Sampler
    from amed_engine.errors import AmedError, ConfigError, FileFormatError, NonFiniteError, UnsafeFileError
    from amed_engine.sampling.denoiser import Denoised
    from amed_engine.sampling.loop import sample
    from amed_engine.sampling.predictors.amed import AMEDPredictor
    from amed_engine.sampling.predictors.coefficient import CoefficientPredictor
    from amed_engine.sampling.predictors.constant import ConstantPredictor
    from amed_engine.solvers import make_solver
    from amed_engine.solvers.plan import Plan, make_plan
    from amed_engine.solvers.schedule import make_schedule
    from amed_engine.solvers.stage import Midpoint
    from amed_engine.training.distill import distill
    from amed_engine.training.fit import fit
    from amed_engine.training.search import search_schedule
    from amed_engine.zoo import load


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
