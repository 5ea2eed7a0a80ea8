"""Optional dependencies: a missing one is named with the line that installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from amed_engine.errors import AmedError


class MissingDependency(AmedError, ImportError):
    """A package that an integration stands on is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """The imported module. Raises MissingDependency with the line that installs the extra it belongs to."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but lacks one of its own is reported as it is.
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingDependency(
            f"this integration needs {module}, which is not installed: pip install 'amed-engine[{extra}]'"
        ) from error
