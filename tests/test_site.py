"""The README and the site lead nowhere that is not there, and leave out no public name.

The last tests read the built site: `make site` builds it and runs them, `make test` does without.
"""

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

import eva_optax

ROOT = Path(__file__).parent.parent
DOCS, BUILT = ROOT / "docs", ROOT / "site"
README = (ROOT / "README.md").read_text()
CONFIG = (ROOT / "mkdocs.yml").read_text()
SITE, REPOSITORY = (re.findall(rf"^{key}: (\S+)$", CONFIG, re.MULTILINE)[0] for key in ("site_url", "repo_url"))
FILES = (f"{REPOSITORY}/blob/main/", REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/")
REFERENCE = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
GUIDES = [page for page in sorted(DOCS.rglob("*.md")) if page.parent.name != "api" and page.name != "changelog.md"]


def page_of(url: str) -> Path:
    """The source of a page of the site."""
    path = url.removeprefix(SITE).strip("/")
    return DOCS / f"{path or 'index'}.md"


def targets(text: str) -> list[str]:
    """Where the links and images of a Markdown page lead."""
    return re.findall(r"\]\((\S+?)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def test_links_of_the_readme_are_absolute_and_lead_somewhere() -> None:
    """Absolute, because a package index shows the README without what is beside it."""
    links = targets(README)
    assert any(link.startswith(FILES[1]) for link in links)
    for link in links:
        assert link.startswith("https://"), link
        for prefix in FILES:
            assert not link.startswith(prefix) or (ROOT / link.removeprefix(prefix)).is_file(), link
        assert not link.startswith(SITE) or page_of(link).is_file(), link


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


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


def test_figures_of_the_readme_are_those_of_the_benchmark() -> None:
    measured = (DOCS / "convergence.md").read_text()
    tasks = ("autoencoder_relu", "autoencoder", "autoencoder_sum", "cnn", "cnn_batchnorm")
    table = README[README.index("## What it costs") :]
    for label, name in (("`eva_adamw`, rank 16", "eva_adamw@16"), ("`eva_adamw`, one direction", "eva_adamw")):
        row, seconds = table[table.index(f"| {label} |") :].splitlines()[:2]
        for place, task in enumerate(tasks, 2):
            section = measured[measured.index(f"### {task}:") :]
            lines = [line.split("|") for line in section.splitlines() if line.startswith("|")]
            columns = [cell.strip() for cell in lines[0]]
            cells = next(cells for cells in lines if cells[1].strip() == name)
            for given, column in ((row, "steps to loss"), (seconds, "seconds to loss")):
                (factor,) = re.findall(r"([\d.]+)×", cells[columns.index(column)])
                assert given.split("|")[place].strip() == factor, (label, task, column)


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
