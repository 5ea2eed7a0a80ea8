"""What one request may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from amed_engine.errors import ConfigError
from amed_engine.solvers.arguments import is_whole, told

YEAR = 366 * 86400.0  # which clocks can still wait


@dataclass(frozen=True)
class Limits:
    """body: bytes of a request. samples: of one request. nfe: evaluations of each sample. program: bytes of a predictor or a
    recipe in a request. seconds: that a client may take to send its body."""

    body: int = 1 << 20
    samples: int = 64
    nfe: int = 64
    program: int = 64 << 10
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "seconds" and not is_whole(value, 1):
                raise ConfigError(f"limit {field.name} must be a whole number above 0, got {told(value)}")
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)) or not 0 < self.seconds <= YEAR:
            raise ConfigError(f"limit seconds must be a number above 0, got {told(self.seconds)}")
