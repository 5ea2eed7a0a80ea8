"""diffusers: AMED as a scheduler with constants, and as a pipeline that predicts per sample.

Import this before loading a saved pipeline that holds one of these: diffusers only looks among imported modules.
"""

from amed_engine.errors import require

require("diffusers", "diffusers")

import diffusers  # noqa: E402

from amed_engine.integrations.diffusers.pipeline import AMEDPipeline, AMEDPredictorModel  # noqa: E402
from amed_engine.integrations.diffusers.scheduler import AMEDScheduler  # noqa: E402

# There, by the name in model_index.json, DiffusionPipeline.from_pretrained looks for the class of a saved pipeline.
diffusers.AMEDPipeline = AMEDPipeline  # type: ignore[attr-defined]

__all__ = ["AMEDPipeline", "AMEDPredictorModel", "AMEDScheduler"]
