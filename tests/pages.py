"""The pages of the documentation: where they are, where they lead, and how the code on them is run and compared."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
CONFIG = (ROOT / "mkdocs.yml").read_text()
SITE, REPOSITORY = (re.findall(rf"^{key}: (\S+)$", CONFIG, re.MULTILINE)[0] for key in ("site_url", "repo_url"))
FILES = (f"{REPOSITORY}/blob/main/", REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+\.\d+")


def execute(code: str, names: dict[str, Any]) -> str:
    """What a block prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "page", "exec"), names)
    return printed.getvalue()


def assert_printed(got: str, want: str) -> None:
    """The same text; numbers with a point may differ by what compilers do to training."""
    assert NUMBER.sub("#", got).split() == NUMBER.sub("#", want).split()
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (got, want)]
    np.testing.assert_allclose(*numbers, rtol=0.05)


def run(text: str) -> None:
    """Runs the blocks of a page one after the other; a text block right behind one is what it prints."""
    names: dict[str, Any] = {"__name__": "page"}
    blocks = list(FENCE.finditer(text))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] != "python":
            continue
        printed = execute(block[2], names)
        if following and following[1] == "text" and not text[block.end() : following.start()].strip():
            assert_printed(printed, following[2])


def side_of_diff(block: str, added: bool) -> str:
    """What a diff leads to, or what it starts from."""
    sign = "+" if added else "-"
    return "\n".join(line[1:] for line in block.splitlines() if not line or line[0] in (" ", sign))


def targets(text: str) -> list[str]:
    """Where the links and images of a page lead."""
    return re.findall(r"\]\((\S+?)\)", FENCE.sub("", text))
