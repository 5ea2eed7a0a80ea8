"""How good samples are: measured, compared between solvers, and held against published figures."""

from amed_engine.evaluation.comparison import Comparison, compare
from amed_engine.evaluation.quality import evaluate
from amed_engine.evaluation.stored import evaluate_samples

__all__ = ["Comparison", "compare", "evaluate", "evaluate_samples"]
