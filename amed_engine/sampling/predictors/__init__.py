"""Predictors: what a solver is told of each interval.

`choices()` of each is what the loop runs: a Midpoint per interval for AMED, EPD and the plugins, a Row per interval for the
solver "nonstationary", or functions of a bottleneck that say one.
"""

from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.sampling.predictors.coefficient import CoefficientPredictor
from amed_engine.sampling.predictors.constant import ConstantPredictor

__all__ = ["AMEDPredictor", "CoefficientPredictor", "ConstantPredictor", "Predictor"]

Predictor = AMEDPredictor | ConstantPredictor | CoefficientPredictor
