"""Evaluation of samples: distances at equal latents, Frechet distance, precision and recall, class accuracy.

from amed_engine import metrics
metrics.frechet(metrics.generate(sampler, range(50_000)), "cifar10-32x32.npz", features="inception")
"""

from amed_engine.evaluation.metrics.classifier import class_accuracy
from amed_engine.evaluation.metrics.distances import Distances, per_image_rmse, psnr, rmse
from amed_engine.evaluation.metrics.features import extractor
from amed_engine.evaluation.metrics.manifold import PrecisionRecall, precision_recall
from amed_engine.evaluation.metrics.sources import batches, frechet, gather, generate, read_features
from amed_engine.evaluation.metrics.statistics import Statistics, frechet_distance

__all__ = [
    "Distances",
    "PrecisionRecall",
    "Statistics",
    "batches",
    "class_accuracy",
    "extractor",
    "frechet",
    "frechet_distance",
    "gather",
    "generate",
    "per_image_rmse",
    "precision_recall",
    "psnr",
    "read_features",
    "rmse",
]
