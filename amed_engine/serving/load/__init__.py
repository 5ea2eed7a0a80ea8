"""An open-loop load generator: requests drawn beforehand by a seed, offered to an engine or a server, and what came of them.

A request counts from the moment at which it was due, not from when it was sent: where a server or the generator itself falls
behind, later requests do not wait unseen.
"""

from amed_engine.serving.load.arrivals import Arrival, Load, Mix
from amed_engine.serving.load.loop import Outcome, Refused, offer
from amed_engine.serving.load.measuring import measure
from amed_engine.serving.load.report import LoadReport, Percentiles
from amed_engine.serving.load.targets import EngineTarget, ServerTarget, Target

__all__ = [
    "Arrival",
    "EngineTarget",
    "Load",
    "LoadReport",
    "Mix",
    "Outcome",
    "Percentiles",
    "Refused",
    "ServerTarget",
    "Target",
    "measure",
    "offer",
]
