"""What one request may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from amed_engine.errors import ConfigError


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
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"limit {field.name} must be a number above 0, got {value!r}")
