"""Everything that names a version of the project, or where it lives, names the same."""

import re
import tomllib
from pathlib import Path

import eva_optax

ROOT = Path(__file__).parent.parent


def test_all_places_name_one_version():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert cited
    assert headings[1] == cited[1] == eva_optax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", eva_optax.__version__)
    assert headings[1:] == sorted(headings[1:], key=lambda name: [int(part) for part in name.split(".")], reverse=True)


def test_the_citation_links_where_the_package_does():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    cited = dict(re.findall(r'^(url|repository-code): "(.+)"$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert cited == {"url": urls["Documentation"], "repository-code": urls["Repository"]}
