"""The exceptions a caller may catch. Each message says what was wrong, what was got, what was expected and what to do."""


class AmedError(Exception):
    """Base of every error raised on purpose by amed_engine."""


class ConfigError(AmedError, ValueError):
    """An argument, a combination of arguments or a pairing of objects that cannot work."""


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
