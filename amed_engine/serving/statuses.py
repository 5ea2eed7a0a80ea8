"""What a server over HTTP answers to an error of the engine."""

from __future__ import annotations

import math

from amed_engine.errors import ConfigError, DeadlineError, EngineClosedError, FileFormatError, QueueFullError

# The first that an error is an instance of.
STATUSES: tuple[tuple[type[BaseException], int], ...] = (
    (QueueFullError, 429),
    (EngineClosedError, 503),
    (DeadlineError, 504),
    (ConfigError, 422),
    (FileFormatError, 422),
)


def status_of(error: BaseException) -> int:
    """500 is what nobody asked for wrongly, a sample that became NaN."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def retry_after(error: QueueFullError) -> str:
    """The header of that name: whole seconds, at least one."""
    return str(max(1, math.ceil(error.retry_after)))
