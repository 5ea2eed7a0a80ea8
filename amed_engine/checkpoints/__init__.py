"""Reading and writing weights: safetensors and JSON, strict, finite, bounded in size, never half a file."""

from amed_engine.checkpoints.files import atomic_write, read, write
from amed_engine.checkpoints.native import fingerprint, load_model, load_predictor, save_model, save_predictor
from amed_engine.checkpoints.programs import load_program

__all__ = [
    "atomic_write",
    "fingerprint",
    "load_model",
    "load_predictor",
    "load_program",
    "read",
    "save_model",
    "save_predictor",
    "write",
]
