"""What the documents point to is there: files, headings, and every page of docs/ from the README."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("findings/*.md")]
)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
NAMED = re.compile(
    r"(?<![\w/.])(?:amed_engine|kernels|csrc|docs|tests|benchmarks)/[\w/.-]+\.(?:py|md|json|png|h|cpp|cu)\b(?!\*)"
)


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them of headings: small letters, no punctuation, a dash for a space."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path, text: str) -> list[str]:
    """Links of a page's text whose file or heading does not exist."""
    found = []
    for file, anchor in LINK.findall(text):
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            found.append(f"{file}#{anchor}" if anchor else file)
    return found


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text("utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_that_are_named_exist(page):
    """Paths from the root, in running text and commands; words in capitals stand for others."""
    named = [name for name in NAMED.findall(page.read_text("utf-8")) if "NETWORK" not in name]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("target", ["docs/no.md", "docs/export.md#no", "#no", "docs/no.png"])
def test_the_check_finds_what_is_missing(target):
    text = f"[a](docs/export.md#trust) [b]({target}) ![c](docs/compare.png)"
    assert broken(ROOT / "README.md", text) == [target]


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text("utf-8")
    pages = [name for name in names(PAGES) if name.startswith("docs/")]
    assert [name for name in pages if name not in text] == []
