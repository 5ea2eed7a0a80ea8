"""Predictors: what a solver is told of each interval."""

from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.sampling.predictors.coefficient import CoefficientPredictor
from amed_engine.sampling.predictors.constant import ConstantPredictor

__all__ = ["AMEDPredictor", "CoefficientPredictor", "ConstantPredictor", "Predictor"]

Predictor = AMEDPredictor | ConstantPredictor | CoefficientPredictor
