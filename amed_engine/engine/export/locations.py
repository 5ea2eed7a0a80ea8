"""Where the C library, its headers and its build files are, for programs that link against it."""

from __future__ import annotations

from pathlib import Path

from amed_engine.errors import ConfigError


def _csrc() -> Path:
    """csrc/ in the installed package, or at the root of a checkout."""
    installed = Path(__file__).parents[2] / "csrc"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "csrc"


def get_include() -> str:
    """The folder of amed/amed.h."""
    return str(_csrc() / "include")


def get_library() -> str:
    """The shared library of the C API. Raises ConfigError where it was not built."""
    library = _csrc() / "lib" / "libamed.so"
    if not library.is_file():
        raise ConfigError(
            f"{library} was not built: install amed-engine from source on Linux where a C++ compiler is found"
        )
    return str(library)


def get_cmake_dir() -> str:
    """For cmake -Damed_DIR=..., then find_package(amed CONFIG) and target amed::amed."""
    return str(_csrc() / "lib" / "cmake" / "amed")


def get_pkgconfig_dir() -> str:
    """For PKG_CONFIG_PATH, then pkg-config --cflags --libs amed."""
    return str(_csrc() / "lib" / "pkgconfig")
