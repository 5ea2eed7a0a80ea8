"""Training a predictor against a teacher's trajectories: the paper's algorithm and its variants."""

from amed_engine.batches import Batches
from amed_engine.distillation.api import distill
from amed_engine.distillation.data import Teacher
from amed_engine.distillation.settings import PRESETS
from amed_engine.distillation.training import Round

__all__ = ["PRESETS", "Batches", "Round", "Teacher", "distill"]
