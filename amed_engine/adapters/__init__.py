"""Adapters: networks of every family as denoisers (x, sigma (B,)) -> Denoised(D, bottleneck)."""

from amed_engine.adapters.adapter import Adapter
from amed_engine.adapters.autoencoders import decode_latents
from amed_engine.adapters.choosing import PREDICTIONS
from amed_engine.adapters.compiled import Compiled, is_package, load_compiled, save_package
from amed_engine.adapters.discrete import DiscreteSteps, alphas_cumprod
from amed_engine.adapters.exporting import save_onnx, save_program
from amed_engine.adapters.family import Coefficients, Family
from amed_engine.adapters.flow import Flow, flow_levels
from amed_engine.adapters.flux import Flux
from amed_engine.adapters.guidance import ClassifierFree, ClassifierGuided, Thresholded
from amed_engine.adapters.karras import EDM, IDDPM, VE, VP, Consistency, ConsistencyFunction
from amed_engine.adapters.latents import encode_texts, wrap_pipeline
from amed_engine.adapters.onnx import OnnxModel, load_onnx
from amed_engine.adapters.schedulers import shift_of
from amed_engine.adapters.score import IndexedScore, Score, VPScore
from amed_engine.adapters.sealed import seal
from amed_engine.adapters.signature import Signature
from amed_engine.adapters.wrapping import wrap

load_package = load_compiled  # its public name here; amed_engine.load_package opens whole loops

__all__ = [
    "EDM",
    "IDDPM",
    "PREDICTIONS",
    "VE",
    "VP",
    "Adapter",
    "ClassifierFree",
    "ClassifierGuided",
    "Coefficients",
    "Compiled",
    "Consistency",
    "ConsistencyFunction",
    "DiscreteSteps",
    "Family",
    "Flow",
    "Flux",
    "IndexedScore",
    "OnnxModel",
    "Score",
    "Signature",
    "Thresholded",
    "VPScore",
    "alphas_cumprod",
    "decode_latents",
    "encode_texts",
    "flow_levels",
    "is_package",
    "load_compiled",
    "load_onnx",
    "load_package",
    "save_onnx",
    "save_package",
    "save_program",
    "seal",
    "shift_of",
    "wrap",
    "wrap_pipeline",
]
