"""U-Nets of the published diffusion models; each returns its bottleneck beside its output."""

from amed_engine.networks.dhariwal_unet import DhariwalUNet
from amed_engine.networks.openai_unet import OpenAIClassifier, OpenAIUNet
from amed_engine.networks.precond import EDMPrecond
from amed_engine.networks.song_unet import SongUNet

__all__ = ["DhariwalUNet", "EDMPrecond", "OpenAIClassifier", "OpenAIUNet", "SongUNet"]
