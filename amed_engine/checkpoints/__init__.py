"""Reading and writing weights: safetensors and JSON, strict, finite, bounded in size, never half a file."""

from amed_engine.checkpoints.conversion import Converted, convert, load_first_stage, load_published
from amed_engine.checkpoints.exported_program import load_program
from amed_engine.checkpoints.files import read, write
from amed_engine.checkpoints.hub import from_pretrained, save_pretrained
from amed_engine.checkpoints.native import load_model, load_predictor, save_model, save_predictor
from amed_engine.solvers.files import atomic_write

__all__ = [
    "Converted",
    "atomic_write",
    "convert",
    "from_pretrained",
    "load_first_stage",
    "load_model",
    "load_predictor",
    "load_program",
    "load_published",
    "read",
    "save_model",
    "save_predictor",
    "save_pretrained",
    "write",
]
