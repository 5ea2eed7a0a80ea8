"""The exceptions a caller may catch. Each message says what was wrong, what was got, what was expected and what to do."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class AmedError(Exception):
    """Base of every error raised on purpose by amed_engine."""


class ConfigError(AmedError, ValueError):
    """An argument, a combination of arguments or a pairing of objects that cannot work."""


class MissingDependency(ConfigError, ImportError):
    """An optional package that cannot be imported."""


class FileFormatError(AmedError, ValueError):
    """A file that is truncated, of another format, or holds something its format forbids."""


class UnsafeFileError(FileFormatError):
    """A pickle that holds something else than plain data of a known kind, or that is damaged. Nothing of it was run."""


class NonFiniteError(AmedError, FloatingPointError):
    """A sample became NaN or infinite. `step` is the interval, `seeds` (or positions) name the samples."""

    def __init__(self, message: str, step: int, seeds: list[int]):
        super().__init__(message)
        self.step = step
        self.seeds = seeds


class QueueFullError(AmedError):
    """A request beyond what may wait. `retry_after`: seconds until there is likely room for it."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(AmedError, TimeoutError):
    """A request that cannot be done by its deadline any more, or never could. It was not drawn."""


class EngineClosedError(AmedError, RuntimeError):
    """A request to an engine that takes no more, or that was closed before it came to the request."""


def require(module: str, extra: str, user: str = "this integration", otherwise: str = "") -> ModuleType:
    """The imported module of an optional package. Raises MissingDependency: who needs it, and how to get it or do without.

    extra: the extra of this package that brings it, or a sentence for what no package index has.
    """
    try:
        return import_module(module)
    except ImportError as error:
        how = extra if " " in extra else f"pip install 'amed-engine[{extra}]'"
        how += f"; or {otherwise}" if otherwise else ""
        raise MissingDependency(f"{user} needs {module}; {how} ({error})") from error
