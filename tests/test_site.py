"""The site leads nowhere that is not there, and leaves out no public name.

The last tests read the built site: `make site` builds it and runs them, `make test` does without.
"""

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

import eva_optax
from tests.pages import DOCS, FILES, ROOT, SITE, targets

BUILT = ROOT / "site"
REFERENCE = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
GUIDES = [page for page in sorted(DOCS.rglob("*.md")) if page.parent.name != "api" and page.name != "changelog.md"]


@pytest.mark.parametrize("page", GUIDES, ids=[page.stem for page in GUIDES])
def test_links_of_a_page_to_the_repository_lead_to_files(page: Path) -> None:
    for link in targets(page.read_text()):
        assert not link.startswith(FILES[0]) or (ROOT / link.removeprefix(FILES[0])).is_file(), link


@pytest.mark.parametrize("name", eva_optax.__all__)
def test_every_public_name_is_in_the_reference_and_in_a_guide(name: str) -> None:
    assert f"::: eva_optax.{name}\n" in REFERENCE, f'add "::: eva_optax.{name}" to a page of docs/api/'
    said = any(re.search(rf"\b{name}\b", page.read_text()) for page in GUIDES)
    assert said, f"no page of docs/ says what {name} is for: mention it in a guide, docs/choose.md for a transformation"


def test_classes_of_what_functions_return_are_in_the_reference() -> None:
    for name in eva_optax._LAZY:
        assert f"heading: eva_optax.{name}," in REFERENCE, name


class Page(HTMLParser):
    """What a built page can be linked to by, and where it leads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


@cache
def parsed(path: Path) -> Page:
    return Page(path)


@pytest.mark.skipif(not BUILT.exists(), reason="`make site` builds it")
def test_docstrings_are_rendered_whole() -> None:
    """Formulas as MathML, tables with all of their cells, names as links."""
    pages = {path.parent.name: path.read_text() for path in BUILT.glob("api/*/index.html")}
    for name, page in pages.items():
        for rest in (".. math::", ":math:", "=====", 'class="arithmatex"', "&gt;&gt;&gt;</p>"):
            assert rest not in page, (name, rest)
    assert "&lt;layer&gt;/cosine" in pages["watching"]
    assert pages["transformations"].count("<math") >= 10
    assert 'href="#eva_optax.scale_by_eva"' in pages["transformations"]


@pytest.mark.skipif(not BUILT.exists(), reason="`make site` builds it")
@pytest.mark.parametrize("path", sorted(BUILT.rglob("*.html")), ids=lambda path: str(path.relative_to(BUILT)))
def test_links_of_a_built_page_lead_somewhere(path: Path) -> None:
    here = urljoin(SITE, path.relative_to(BUILT).as_posix().removesuffix("index.html"))
    for link in parsed(path).links:
        url, anchor = urldefrag(urljoin(here, link))
        if not url.startswith(SITE):
            scheme = urlparse(url).scheme
            assert scheme == "https" or (scheme == "data" and "," in url), link  # what is outside is not fetched
            continue
        file = BUILT / unquote(url.removeprefix(SITE))
        file = file / "index.html" if file.is_dir() else file
        assert file.is_file(), link
        assert file.suffix != ".html" or unquote(anchor) in parsed(file).anchors, link
