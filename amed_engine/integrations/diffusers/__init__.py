"""diffusers: AMED as a scheduler with constants, and as a pipeline that predicts per sample.

Import this before loading a saved pipeline that holds an AMEDScheduler: diffusers only looks among imported modules.
"""

from amed_engine.integrations.require import require

require("diffusers", "diffusers")

from amed_engine.integrations.diffusers.pipeline import AMEDPipeline, AMEDPredictorModel  # noqa: E402
from amed_engine.integrations.diffusers.scheduler import AMEDScheduler  # noqa: E402

__all__ = ["AMEDPipeline", "AMEDPredictorModel", "AMEDScheduler"]
