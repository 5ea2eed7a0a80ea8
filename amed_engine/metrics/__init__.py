"""The public name of `amed_engine.evaluation.metrics`."""

from amed_engine.evaluation.metrics import *  # noqa: F403
from amed_engine.evaluation.metrics import __all__ as __all__
