"""The check for optional packages, by the name it has here."""

from amed_engine.errors import MissingDependency, require

__all__ = ["MissingDependency", "require"]
