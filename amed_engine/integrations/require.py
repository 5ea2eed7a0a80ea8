"""Optional dependencies: a missing one is named with the line that installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from amed_engine.errors import AmedError


class MissingDependency(AmedError, ImportError):
    """A package that an integration stands on is not installed."""


def require(module: str, remedy: str) -> ModuleType:
    """The imported module. Raises MissingDependency that says how to get it.

    remedy: the extra of this package that brings it, or a sentence for what no package index has.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but lacks one of its own is reported as it is.
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        how = remedy if " " in remedy else f"pip install 'amed-engine[{remedy}]'"
        raise MissingDependency(f"this integration needs {module}, which is not installed: {how}") from error
