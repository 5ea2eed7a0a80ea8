"""The API reference: a page for every module, made of its docstrings by pdoc. `make docs` runs it.

    python docs/build_reference.py build/docs

It fails on every warning: of pdoc, where an annotation or a name of `__all__` does not resolve; of its own, where a public name
has no docstring, or a docstring names something of the package that is not there. A module whose library is not installed
cannot be imported: it is left out, and named together with the line that installs it.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path

from pdoc import doc, render

from amed_engine import AmedError

PACKAGES = ("amed_engine", "amed_engine.kernels")  # kernels/ stands beside amed_engine/ in a checkout
NAMED = re.compile(r"\bamed_engine(?:\.\w+)+")


def names() -> list[str]:
    """Dotted names of all modules but private ones, importable or not."""
    found = set()
    for package in PACKAGES:
        folder = Path(importlib.import_module(package).__path__[0])
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found.add(".".join([package, *parts]).removesuffix(".__init__"))
    return sorted(name for name in found if "._" not in name)


def load(name: str) -> doc.Module | None:
    """The module's page; None, and a line that says why, where an optional library is missing."""
    try:
        module = importlib.import_module(name)
    except AmedError as error:
        if not isinstance(error, ImportError):
            raise
        print(f"left out: {name}: {error}")
        return None
    for public in getattr(module, "__all__", ()):
        getattr(module, public, None)  # pdoc looks into the module's dictionary, where names of first use are not yet
    for _, made in inspect.getmembers(module, inspect.isclass):
        if issubclass(made, tuple) and made.__module__ == name:
            # A NamedTuple's constructor has its annotations as text, without the module to look their names up in.
            made.__new__.__annotations__ = typing.get_type_hints(made)
    return doc.Module(module)


def nest(pages: dict[str, doc.Module]) -> None:
    """Name every module on its package's page; pdoc names none where the package has `__all__`."""
    for name, page in pages.items():
        page.submodules = [pages[other] for other in pages if other.rpartition(".")[0] == name]


def flaws(page: doc.Module | doc.Class) -> Iterator[str]:
    """What pdoc does not see: public names without a docstring, and names in docstrings that lead nowhere."""
    public = getattr(page.obj, "__all__", ())
    for name, member in page.members.items():
        if name in public and isinstance(member, doc.Class | doc.Function) and not member.docstring:
            yield f"{member.fullname} is public and has no docstring"
        if isinstance(member, doc.Class):
            yield from flaws(member)
    for documented in (page, *page.members.values()):
        for named in NAMED.findall(documented.docstring):
            if not resolves(named):
                yield f"the docstring of {documented.fullname} names {named}, which is not there"


def resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except AmedError:  # a module whose library is not installed
        return True
    except (ImportError, AttributeError):
        # resolve_name takes a module whose library is not installed for one that is not there.
        return _is_module(name)
    return True


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def write(pages: dict[str, doc.Module], out: Path) -> None:
    for name, page in pages.items():
        file = out / f"{name.replace('.', '/')}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render.html_module(page, pages), "utf-8")
    (out / "index.html").write_text(render.html_index(pages), "utf-8")
    (out / "search.js").write_text(render.search_index(pages), "utf-8")


def main(out: Path) -> int:
    loaded = {name: load(name) for name in names()}
    pages = {name: page for name, page in loaded.items() if page is not None}
    nest(pages)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(pages, out)
    found = [*(str(warning.message) for warning in caught), *(flaw for page in pages.values() for flaw in flaws(page))]
    for flaw in found:
        print(f"warning: {flaw}", file=sys.stderr)
    print(f"{out}: {len(pages)} modules, {len(found)} warnings")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
