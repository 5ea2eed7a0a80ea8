"""amed_engine: samples from a pretrained diffusion model in about five network evaluations.

    result = amed_engine.Sampler("digits").run(8)

Names are imported on first use, so that `import amed_engine` and the command line start without loading torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "AMEDPredictor": "predictor",
    "AmedError": "errors",
    "ConfigError": "errors",
    "Denoised": "denoiser",
    "FileFormatError": "errors",
    "Midpoint": "program",
    "NonFiniteError": "errors",
    "Plan": "plan",
    "Sampler": "sampler",
    "StaleGraphError": "capture",
    "SampleResult": "results",
    "StepInfo": "results",
    "distill": "distillation",
    "load": "zoo",
    "load_package": "packages",
    "load_predictor": "checkpoints",
    "make_plan": "plan",
    "make_schedule": "schedule",
    "make_solver": "solvers",
    "sample": "loop",
    "save_predictor": "checkpoints",
}

__all__ = [
    "AMEDPredictor",
    "AmedError",
    "ConfigError",
    "Denoised",
    "FileFormatError",
    "Midpoint",
    "NonFiniteError",
    "Plan",
    "SampleResult",
    "Sampler",
    "StaleGraphError",
    "StepInfo",
    "__version__",
    "distill",
    "load",
    "load_package",
    "load_predictor",
    "make_plan",
    "make_schedule",
    "make_solver",
    "sample",
    "save_predictor",
]

if TYPE_CHECKING:
    from amed_engine.capture import StaleGraphError
    from amed_engine.checkpoints import load_predictor, save_predictor
    from amed_engine.denoiser import Denoised
    from amed_engine.distillation import distill
    from amed_engine.errors import AmedError, ConfigError, FileFormatError, NonFiniteError
    from amed_engine.loop import sample
    from amed_engine.packages import load_package
    from amed_engine.plan import Plan, make_plan
    from amed_engine.predictor import AMEDPredictor
    from amed_engine.program import Midpoint
    from amed_engine.results import SampleResult, StepInfo
    from amed_engine.sampler import Sampler
    from amed_engine.schedule import make_schedule
    from amed_engine.solvers import make_solver
    from amed_engine.zoo import load


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
